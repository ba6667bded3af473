"""From an adapter and its base to a folder with a plain model, which needs neither."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import MergeError
from veneer.loader import load
from veneer.printable import printable
from veneer.source import ADAPTER_CONFIG, MODEL_CONFIG, resolve

if TYPE_CHECKING:
    from rich.console import RenderableType

# Written anew for the merged model, or belonging to the adapter alone: not copied from the base.
_OWN = ("config.json", "generation_config.json", ".gitattributes")
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        adapter: the adapter's path or id.
        base: the base model and why it was this one.
        out: the folder that was written.
        layers: adapted layers merged.
        saved_modules: modules of the adapter that replaced the base's.
        dtype: of the merged weights.
        nbytes: bytes written.
        files: their names.
        seconds: from start to end.
    """

    adapter: str
    base: str
    out: str
    layers: int
    saved_modules: list[str]
    dtype: str
    nbytes: int
    files: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """A panel with one row a fact."""
        from rich.markup import escape
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        merged = f"{self.layers} layers" + (f" and {', '.join(self.saved_modules)}" if self.saved_modules else "")
        rows = [
            ("adapter", self.adapter),
            ("base", self.base),
            ("merged", merged),
            ("out", f"{self.out}: {len(self.files)} files, {self.nbytes / 1e6:.1f} MB, {self.dtype}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        for name, value in rows:
            table.add_row(name, escape(printable(value)))
        return Panel(table, title="merge report", title_align="left", border_style="green", expand=False)


def merge(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    out: str | Path,
    dtype: Any = "auto",
    overwrite: bool = False,
    safe_merge: bool = True,
    on_step: Callable[[str], None] = lambda step: None,
    **load_options: Any,
) -> MergeReport:
    """Merge an adapter into its base and write the result as a plain model folder.

    The output appears only when it is complete. The tokenizer, chat template and other small files come along,
    the adapter's own before the base's; no adapter file does.

    Args:
        adapter: the adapter's folder or hub id.
        base: the base; by default what the adapter's config names.
        out: the folder to write. It must not exist or be empty, unless ``overwrite``.
        dtype: of the merged weights; ``"auto"`` keeps the base's.
        overwrite: replace what is at ``out``.
        safe_merge: check first that every merged weight is finite.
        on_step: called with what begins now, for a progress display.
        **load_options: as for :func:`veneer.load`.

    Raises:
        MergeError: ``out`` is taken, or ``adapter`` is no adapter. Whatever loading raises.
    """
    started = time.perf_counter()
    target = Path(out)
    if target.is_symlink():  # the folder it leads to is written, and the link stays
        target = target.resolve()
    _check_target(target, overwrite)
    on_step("loading")
    model = load(adapter, base=base, dtype=dtype, **load_options)
    report = model.load_report
    assert report is not None
    if not model.active_adapters:
        raise MergeError(f"{adapter} is a full model; there is nothing to merge.", hint="Give an adapter's path.")
    if target.resolve() == Path(model.name_or_path).resolve():
        raise MergeError(f"{target} is the base itself; a merge does not replace it.", hint="Choose another folder.")
    layers = {layer for a in report.adapters for layer in a.layers if a.name in model.active_adapters}
    saved = sorted({root for a in report.adapters for root in a.saved_modules if a.name in model.active_adapters})
    on_step("merging")
    merged = model.merge_and_unload(safe_merge=safe_merge)
    on_step("writing")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.writing-") as temporary:
        folder = Path(temporary) / "model"
        merged.save_pretrained(folder)
        for place in (model.name_or_path, str(adapter)):
            _bring_along(resolve(place, local_files_only=True).root, folder)
        _replace(folder, target)
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    return MergeReport(
        adapter=str(adapter),
        base=report.base,
        out=str(target),
        layers=len(layers),
        saved_modules=saved,
        dtype=report.dtype,
        nbytes=sum((target / name).stat().st_size for name in files),
        files=files,
        seconds=time.perf_counter() - started,
    )


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_file():
        raise MergeError(f"{target} is a file.", hint="Give a folder that does not exist yet.")
    nearest = next((place for place in (target, *target.parents) if place.exists()), Path())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise MergeError(
            f"{target} cannot be written: {nearest} is no folder open to writing.", hint="Choose another place."
        )
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise MergeError(
                f"{target} is not empty.", hint="Choose another folder, or pass --overwrite (overwrite=True)."
            )
        if not (target / MODEL_CONFIG).is_file() or (target / ADAPTER_CONFIG).is_file():
            raise MergeError(
                f"{target} holds something other than a plain model; it is not replaced.",
                hint="Choose another folder, or empty this one yourself.",
            )


def _bring_along(origin: Path, folder: Path) -> None:
    """Copy the small files beside a checkpoint: tokenizer, chat template, licence ..."""
    for path in sorted(origin.iterdir()):
        unwanted = path.name in _OWN or path.name.endswith(_WEIGHTS) or path.name.startswith(("adapter_", "."))
        if path.is_file() and not unwanted and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)


def _replace(folder: Path, target: Path) -> None:
    """Put a complete folder in the place of ``target``."""
    if not target.exists():
        folder.rename(target)
        return
    old = folder.parent / "old"
    target.rename(old)
    folder.rename(target)
