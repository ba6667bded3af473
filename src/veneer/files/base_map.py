"""Maps the names by which adapters know their bases to places on this machine. No torch.

    {"meta-llama/Llama-3.2-1B": "/models/llama-1b", "/workspace/models/": "/models/"}

A name that ends in a slash stands for everything below it. The map is the file ``veneer/base_map.json`` in the user's
configuration folder, or what ``VENEER_BASE_MAP`` says instead: another file's path, or ``name=place`` pairs with
semicolons between them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from veneer.errors import ConfigError

VARIABLE = "VENEER_BASE_MAP"


def look_up(name: str) -> str | None:
    """Return the place that the map gives for a base's name; ``None`` when it gives none.

    Raises:
        ConfigError: the map cannot be read.
    """
    places = _read()
    if name in places:
        return places[name]
    below = [folder for folder in places if folder.endswith("/") and name.startswith(folder)]
    if not below:
        return None
    longest = max(below, key=len)
    return str(Path(places[longest]) / name[len(longest) :])


def places_of(name: str, beside: Path) -> dict[str, str]:
    """Return each place where a base may be that an adapter's config names, and why there, in the order to look.

    Args:
        name: the base's name in the config.
        beside: the adapter's folder.

    Raises:
        ConfigError: the base map cannot be read.
    """
    moved = look_up(name)
    if moved is not None:
        return {moved: f"where the base map says that {name} is"}
    # Joining an absolute name to the folder gives the name itself, so that a path is never tried twice.
    return {str(beside / name): "relative to the adapter's folder", name: "named by the adapter's config"}


def _read() -> dict[str, str]:
    setting = os.environ.get(VARIABLE)
    if setting is None:
        usual = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "veneer" / "base_map.json"
        return _from_file(usual) if usual.is_file() else {}
    if "=" in setting and not Path(setting).is_file():
        pairs = [pair.partition("=") for pair in setting.split(";") if pair.strip()]
        return _checked({name.strip(): place.strip() for name, _, place in pairs}, VARIABLE)
    return _from_file(Path(setting)) if setting else {}


def _from_file(path: Path) -> dict[str, str]:
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The base map {path} cannot be read: {error}.",
            hint=f"It is a JSON object of names and places; {VARIABLE} names the file.",
        ) from error


def _checked(places: object, where: str) -> dict[str, str]:
    if not isinstance(places, dict) or not all(k and isinstance(v, str) and v for k, v in places.items()):
        raise ConfigError(
            f"{where}: a base map gives a place, as text, for each name.",
            hint='Such as {"meta-llama/Llama-3.2-1B": "/models/llama-1b"}.',
        )
    return places
