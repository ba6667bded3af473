"""Finds the modules of peft, and the metadata of its distribution, in Veneer: a finder on ``sys.meta_path``."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.as_peft.names import MODULES, PACKAGE, PEFT_VERSION, Home
from veneer.errors import UnsupportedError


class StandIn(ModuleType):
    """A module of peft's whose names are Veneer's, each fetched when it is first used."""

    def __getattr__(self, name: str) -> Any:
        homes: dict[str, Home] = self.__dict__.get("_homes", {})
        if name in homes:
            value = homes[name].fetch()
            setattr(self, name, value)
            return value
        if not name.startswith("__") and f"{self.__name__}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        raise AttributeError(_absent(f"{self.__name__}.{name}"), name=name, obj=self)

    def __dir__(self) -> list[str]:
        below = [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == self.__name__]
        return sorted({*vars(self), *vars(self).get("_homes", ()), *below})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds peft's modules, and the metadata of its distribution, in Veneer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module of peft's; ``None`` for any other module.

        Raises:
            ModuleNotFoundError: Veneer has no such module or name. ``from peft.x import y`` asks here for ``peft.x.y``
                last, so this is the error that the user sees.
        """
        if fullname.partition(".")[0] != PACKAGE:
            return None
        if fullname not in MODULES:
            # Named for the package: Python would put its own text in the place of this, were it named for the module.
            raise ModuleNotFoundError(_absent(fullname), name=PACKAGE)
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=_FILE, is_package=True)
        spec.has_location = True
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the module, with no names fetched yet."""
        return StandIn(spec.name, f"Veneer in the place of {spec.name}: see veneer.as_peft.")

    def exec_module(self, module: ModuleType) -> None:
        """Tell the module where its names are."""
        homes = MODULES[module.__name__]
        vars(module)["_homes"] = homes
        module.__all__ = sorted(name for name in homes if not name.startswith("_"))  # type: ignore[attr-defined]
        if module.__name__ == PACKAGE:
            module.__version__ = PEFT_VERSION  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the metadata of peft's distribution, where it or any is asked for."""
        name = None if context is None else context.name
        return [PeftDistribution()] if name is None or name.lower() == PACKAGE else []


class PeftDistribution(importlib.metadata.Distribution):
    """The metadata of the peft whose names and behaviour Veneer offers."""

    def read_text(self, filename: str) -> str | None:
        """Return the contents of a metadata file; ``None`` if there is no such file."""
        summary = "Veneer in the place of peft (veneer.as_peft)"
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {PEFT_VERSION}\nSummary: {summary}\n",
            "top_level.txt": f"{PACKAGE}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        """Return the place of a file of the distribution, which has none."""
        return Path(_FILE).parent / path


_FILE = str(Path(__file__).parent / "names.py")
_FINDER = Finder()


def install() -> None:
    """Let ``import peft`` mean Veneer from now on; nothing changes where it does already.

    Raises:
        UnsupportedError: peft itself is imported already.
    """
    if _FINDER in sys.meta_path:
        return
    real = sys.modules.get(PACKAGE)
    if real is not None and not isinstance(real, StandIn):
        raise UnsupportedError(
            f"peft itself is imported already, from {getattr(real, '__file__', None)}; Veneer cannot take its place.",
            hint="Import veneer.as_peft before what imports peft, or run `python -m veneer.as_peft script.py`.",
        )
    sys.meta_path.insert(0, _FINDER)
    _forget_searches()


def undo() -> None:
    """Let ``import peft`` mean peft again; what was imported before stays Veneer's."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name, module in list(sys.modules.items()):
        if isinstance(module, StandIn):
            del sys.modules[name]
    _forget_searches()


def _forget_searches() -> None:
    """Drop what Python, and transformers where it is imported, remember of an earlier search for peft."""
    importlib.invalidate_caches()
    checks = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal"):
        forget = getattr(getattr(checks, name, None), "cache_clear", None)
        if forget is not None:
            forget()


def _absent(name: str) -> str:
    return (
        f"Veneer, which stands in for peft here (veneer.as_peft), has no {name}. "
        "docs/from-peft.md lists what it has; ask for a missing name with an issue that says what needs it."
    )
