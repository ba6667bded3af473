"""Lets tests import names of peft that Veneer lacks: only the tests that use such a name fail, not the whole file."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

from veneer.as_peft import import_hook


class Absent(type):
    """The class of what stands for a name that Veneer lacks, and fails when it is used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "pytestmark":
            raise AttributeError(name)
        raise NotImplementedError(f"Veneer has no {cls.__name__}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Veneer has no {cls.__name__}")

    def __instancecheck__(cls, instance: object) -> bool:
        raise NotImplementedError(f"Veneer has no {cls.__name__}")


def in_a_test() -> bool:
    """Tell whether the import or attribute that is being looked up stands in a file of the suite."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("tests.")


def install() -> None:
    """Answer what Veneer refuses, for the suite's own files alone."""
    lookup, find = import_hook.StandIn.__getattr__, import_hook.Finder.find_spec

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return lookup(self, name)
        except AttributeError:
            if name.startswith("__") or not in_a_test():
                raise
            return Absent(f"{self.__name__}.{name}", (), {})

    def find_spec(self: Any, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.startswith("peft.") and fullname not in import_hook.MODULES and in_a_test():
            import_hook.MODULES[fullname] = {}
        return find(self, fullname, path, target)

    import_hook.StandIn.__getattr__ = __getattr__  # type: ignore[method-assign]
    import_hook.Finder.find_spec = find_spec  # type: ignore[method-assign]
