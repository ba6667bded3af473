"""Pictures the top of the example report in Chromium: ``docs/images/bench.png``, the advice and two panels.

    python tools/picture_report.py

After a new run in ``docs/example-report``; the report itself is made from its figures by
``files.write(files.read(EXAMPLE), EXAMPLE)`` (``tests/benching/test_example.py``).
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.benching.browser import Browser, find  # noqa: E402

WIDTH, SCROLL_BAR, MARGIN = 1120, 15, 12


def main() -> None:
    """Open the report, and write its picture."""
    path = find()
    if path is None:
        raise SystemExit("There is no Chromium on this machine.")
    with tempfile.TemporaryDirectory() as folder, Browser(path, Path(folder) / "profile") as browser:
        page = ROOT / "docs" / "example-report" / "report.html"
        browser.open(page.as_uri(), WIDTH + SCROLL_BAR, dark=False)
        bottom = browser.evaluate("document.querySelectorAll('.card')[1].getBoundingClientRect().bottom")
        picture = Image.open(io.BytesIO(browser.picture())).convert("RGB")
    cropped = picture.crop((0, 0, WIDTH, round(bottom) + MARGIN))
    colours = cropped.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours.save(ROOT / "docs" / "images" / "bench.png", optimize=True)


if __name__ == "__main__":
    main()
