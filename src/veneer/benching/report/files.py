"""Writes and reads the files of a report: HTML, Markdown and JSON, and a JSON of every run beside them.

folder/report.html, report.md, report.json     the last run
folder/runs/2026-01-31T12-00-00Z.json          each run
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from veneer.benching.result import BenchData
from veneer.errors import NotACheckpointError, OutputError, SourceError
from veneer.files.atomic_write import atomic_write
from veneer.files.json_file import read_json
from veneer.files.output_folder import check_writable
from veneer.files.paths import exists, is_file, is_folder
from veneer.packages import require

HTML, MARKDOWN, JSON, RUNS = "report.html", "report.md", "report.json", "runs"


def write(report: BenchData, folder: Path, plots: bool = True) -> Path:
    """Write all files, and return the HTML file's path.

    Args:
        report: the run.
        folder: the folder for the files.
        plots: write the HTML file too, for which matplotlib draws.

    Raises:
        UnsupportedError: matplotlib is not installed. OutputError: the folder cannot be written.
    """
    check(folder)
    if plots:
        check_plots()
    from veneer.benching.report.markdown import markdown

    data = json.dumps(report.to_dict(), indent=1) + "\n"
    # The time in a report that was read may hold anything: no path separator may stay.
    run = re.sub(r"[^\w.-]", "-", report.made.replace("+00:00", "Z")).lstrip(".")
    contents = {
        f"{RUNS}/{run}.json": data,
        JSON: data,
        MARKDOWN: markdown(report),
    }
    if plots:
        from veneer.benching.report.html import html

        contents[HTML] = html(report)
    else:
        (folder / HTML).unlink(missing_ok=True)  # of an earlier run, which report.json is not
    for name, text in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / HTML


def check_plots() -> None:
    """Raise ``UnsupportedError`` where the plots cannot be drawn."""
    require("The report with its plots", "matplotlib", extra="bench")


def check(folder: Path, read_from: Iterable[Path] = ()) -> None:
    """Refuse a folder that :func:`write` could not use, before anything is measured.

    Args:
        folder: of the report.
        read_from: files that the run reads, which the report must not replace.
    """
    check_writable(folder)
    written = {(folder / name).resolve() for name in (HTML, MARKDOWN, JSON)} if exists(folder) else set()
    taken = next((path for path in read_from if path.resolve() in written), None)
    if taken is not None:
        raise OutputError(f"{taken} is read, and the report would replace it.", hint="Give --out another folder.")
    if any(exists(folder / name) for name in (HTML, MARKDOWN, JSON)):
        try:
            read(folder)
        except SourceError as error:
            raise OutputError(
                f"{folder} holds a report of something else; it is not replaced.", hint="Give --out another folder."
            ) from error


def read(path: Path) -> BenchData:
    """Read a run from its JSON file, or from a report's folder.

    Raises:
        SourceError: there is none, or it is damaged.
    """
    file = path / JSON if is_folder(path) else path
    if not is_file(file):
        raise NotACheckpointError(f"There is no report at {path}.", hint=f"Give a folder or {JSON} of `veneer bench`.")
    return BenchData.from_dict(read_json(file), str(path))
