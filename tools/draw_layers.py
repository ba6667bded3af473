"""Draws the layers of the source, from the contract that `make lint` holds it to: docs/images/layers.svg."""

from __future__ import annotations

import ast
import re
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "layers.svg"
WIDTH, HEIGHT, GAP, LETTER = 960, 54, 10, 6.2


def layers() -> list[list[str]]:
    """Read the rooms of each layer, the highest first, from the contract in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = text[text.index('name = "imports go downwards"') :]
    listed = contract[contract.index("layers = [") : contract.index("]", contract.index("layers = ["))]
    return [re.split(r"\s*[:|]\s*", layer) for layer in re.findall(r'"([^"]+)"', listed)]


def what_it_owns(room: str) -> str:
    """Return the first paragraph of a room's docstring."""
    package = ROOT / "src" / "veneer" / room / "__init__.py"
    file = package if package.exists() else package.parent.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].replace("``", "").split())


def picture() -> str:
    """Draw the layers: a row for each, a box for each room; imports go downwards."""
    rows = layers()
    height = len(rows) * (HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The layers of Veneer: imports go downwards only</title>",
        "<style>.box{fill:#eef3f8;stroke:#5a7ca0}.name{font-size:14px;font-weight:bold;fill:#12263a}"
        ".owns{font-size:11.5px;fill:#33475b}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for row, rooms in enumerate(rows):
        width = (WIDTH - GAP * (len(rooms) + 1)) / len(rooms)
        for column, room in enumerate(rooms):
            parts += _box(GAP + column * (width + GAP), GAP + row * (HEIGHT + GAP), width, room)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, room: str) -> list[str]:
    lines = textwrap.wrap(what_it_owns(room), int((width - 20) / LETTER))[:2]
    owns = [
        f'<text class="owns" x="{x + 10:.0f}" y="{y + 33 + 14 * n:.0f}">{escape(line)}</text>'
        for n, line in enumerate(lines)
    ]
    return [
        f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="5"/>',
        f'<text class="name" x="{x + 10:.0f}" y="{y + 18:.0f}">{escape(room)}</text>',
        *owns,
    ]


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
