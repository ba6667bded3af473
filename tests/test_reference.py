"""The site of the documentation is built without a warning, and can be read offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
# What a page asks for while it is shown: scripts, style sheets, pictures, not the links that a reader may follow.
ASKED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"|url\(["']?([^"')]+)"""
)


def test_the_site_is_built_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the site needs the extra docs")
    site = tmp_path / "site"
    flags = ["--fail-on-warning", "--keep-going", "--quiet", "-c", REFERENCE, "-d", tmp_path / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *map(str, flags), str(ROOT), str(site)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "default"}
    built = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert {site / "index.html", site / "README.html", site / "docs" / "reference" / "loading.html"} <= set(pages)
    asked = [found for page in pages for groups in ASKED.findall(page.read_text("utf-8")) for found in groups if found]
    assert asked
    assert not [address for address in asked if re.match(r"(https?:)?//", address)]
