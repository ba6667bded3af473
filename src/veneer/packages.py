"""Checks the optional packages that features need beyond Veneer's own dependencies."""

from __future__ import annotations

import importlib.util
import shlex
import sys

from veneer.errors import UnsupportedError, VeneerError

# A package's name on the index -> the name that it is imported by, where the two differ.
_MODULES = {
    "PyWavelets": "pywt",
    "prometheus-client": "prometheus_client",
    "ray[serve]": "ray",
    "scikit-learn": "sklearn",
}

# Packages that transformers needs to read a GGUF file.
GGUF_PACKAGES = ("accelerate", "gguf")


def require(what: str, *packages: str, extra: str, error: type[VeneerError] = UnsupportedError) -> None:
    """Check that the packages which a feature needs are installed.

    Args:
        what: the feature, as the subject of a sentence.
        packages: the packages' names on the index.
        extra: the extra of this project that lists them.
        error: what is raised.

    Raises:
        VeneerError: one of them is missing; of the class ``error``.
    """
    missing = [name for name in packages if importlib.util.find_spec(_MODULES.get(name, name)) is None]
    if missing:
        names, verb = " and ".join(missing), "is" if len(missing) == 1 else "are"
        raise error(f"{what} needs {names}, which {verb} not installed.", hint=how_to_install(missing, extra))


def stands_in_for_peft() -> bool:
    """Tell whether ``import peft`` means Veneer in this process: see :mod:`veneer.as_peft`."""
    return any(type(finder).__module__ == "veneer.as_peft.import_hook" for finder in sys.meta_path)


def how_to_install(packages: list[str], extra: str) -> str:
    """Return the commands that install packages: by name, or as an extra of a clone, since Veneer is on no index."""
    return f"Run: pip install {shlex.join(packages)} (or, in a clone of Veneer: pip install '.[{extra}]')"
