"""Makes an adapter's config of few options: the method, its rank and scale, and what it targets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from veneer.configs.base import PeftConfig, config_class
from veneer.configs.names import PeftType, TaskType
from veneer.errors import UsageError
from veneer.files.paths import is_folder

# Option -> the fields that it can mean, of which a method's config has one or none.
_FIELDS = {"r": ("r", "rank"), "alpha": ("lora_alpha", "alpha"), "target_modules": ("target_modules",)}
_CONFIG_HINT = "Leave it out, or give all options of the method by --config adapter_config.json (config=)."


def method_config(
    method: str | None,
    config: PeftConfig | str | Path | None,
    r: int | None,
    alpha: float | None,
    target_modules: str | list[str] | None,
) -> PeftConfig:
    """Return the config of a new adapter, for causal language models where it names no task.

    Raises:
        UsageError: the method has no such option, or options are given beside a config.
    """
    given = {"r": r, "alpha": alpha, "target_modules": target_modules}
    options = {name: value for name, value in given.items() if value is not None}
    if config is None:
        made = _made(method or PeftType.LORA.value, options)
    elif options or method is not None:
        names = ", ".join([*(["method"] if method else []), *options])
        raise UsageError(f"A config is given, and {names} beside it.", hint="Put it into the config.")
    else:
        made = config if isinstance(config, PeftConfig) else _read(Path(config))
    # A config that an adapter was saved with says that it is for inference, which in peft's place leaves it frozen.
    return dataclasses.replace(made, task_type=made.task_type or TaskType.CAUSAL_LM, inference_mode=False)


def _made(method: str, options: dict[str, Any]) -> PeftConfig:
    kind = config_class(method.upper(), "method")
    known = {field.name for field in dataclasses.fields(kind)}
    values = {_field(name, known, method): value for name, value in options.items()}
    if method.upper() == PeftType.LORA:
        values = {"r": 16, "lora_alpha": 2 * values.get("r", 16), "target_modules": "all-linear", **values}
    return kind(**values)


def _field(option: str, known: set[str], method: str) -> str:
    for field in _FIELDS[option]:
        if field in known:
            return field
    raise UsageError(f"The method {method} has no {option}.", hint=_CONFIG_HINT)


def _read(path: Path) -> PeftConfig:
    if is_folder(path):
        return PeftConfig.from_pretrained(path)
    return PeftConfig.from_dict(PeftConfig.from_json_file(path), where=str(path))
