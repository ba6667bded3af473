"""Reads and writes ``adapter_config.json``: a dataclass for each method, which users write too.

The file has the PEFT format: one flat JSON object, keys sorted, whose ``peft_type`` names the method. Unknown keys
are kept and written back; :func:`check_unknown_keys` says when one is an error.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from veneer.configs import patterns
from veneer.configs.names import PeftType, TaskType
from veneer.configs.value_checks import check_at_least_one, check_types
from veneer.errors import (
    ConfigError,
    ConfigTypeError,
    UnknownKeyError,
    UnknownMethodError,
    UnsupportedError,
    did_you_mean,
)
from veneer.files.json_file import read_json
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.resolve import resolve
from veneer.keywords import IGNORED, PAST_SOURCE, SOURCE, TOKEN, Fields, strict, subset, takes
from veneer.printing import first_line, warn

# Keys that describe a checkpoint and never change what it computes; peft up to 0.2 wrote merge_weights, which said when
# its own layers merge.
_DESCRIPTIVE = frozenset(
    {"_name_or_path", "model_id", "tags", "license", "language", "author", "description", "name", "merge_weights"}
    # Heeded where a file is read: see formats/expert_layouts.py.
    | {"lora_B_layout"}
)

# Keys in the config of an adapter of MLX-LM, and in none of PEFT's.
_MLX_KEYS = frozenset({"fine_tune_type", "lora_parameters"})

# Fields that no file has.
NOT_IN_FILES = frozenset({"extra", "runtime_config"})

# A regular expression, a keyword, or names.
Names = set[str] | list[str] | str

# Written as null by some tools for "none".
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})


@strict
@dataclass
class PeftConfig(Fields):
    """Base of all configs: the fields that every method has.

    ``PeftConfig.from_pretrained(path)`` reads any adapter's config and returns its method's own class.
    """

    peft_type: PeftType | str | None = None
    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    # Keys that were in the file and are unknown here; written back as they were.
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    # The class's method, given as ``class XyzConfig(TargetedConfig, peft_type=...)``.
    own_type: ClassVar[PeftType | str | None] = None
    # How the names of the method's tensors begin, such as ``lora`` in ``lora_A.weight``: by default as its type.
    tensor_head: ClassVar[str] = ""
    # option -> the values that this version supports; anything else in the file is refused, never ignored.
    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init_subclass__(cls, *, peft_type: PeftType | str | None = None, **kwargs: Any) -> None:
        """Register the class as the config of ``peft_type``."""
        super().__init_subclass__(**kwargs)
        if peft_type is not None:
            cls.own_type = peft_type
            cls.tensor_head = cls.__dict__.get("tensor_head", str(peft_type).lower())
            register_config(str(peft_type), cls)

    def __post_init__(self) -> None:
        if self.own_type is not None:
            self.peft_type = self.own_type
        check_types(self)
        self._check_task()

    def _check_task(self) -> None:
        if self.task_type is None:
            return
        tasks = [task.value for task in TaskType]
        if self.task_type not in tasks:
            raise ConfigError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {', '.join(tasks)}.",
                hint=did_you_mean(str(self.task_type).upper(), tasks) or "Leave it out for any other task.",
            )
        self.task_type = TaskType(self.task_type)

    @property
    def is_prompt_learning(self) -> bool:
        """True for methods that change the input instead of weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """True for adaption prompts (LLaMA-Adapter)."""
        return self.own_type == PeftType.ADAPTION_PROMPT

    @property
    def method_name(self) -> str:
        """The method that serves the config, a file in ``methods/``: one ``peft_type`` may have several."""
        return str(self.peft_type)

    @property
    def experts(self) -> tuple[str, ...]:
        """Adapters on the same model that this one mixes, by their names."""
        return ()

    @property
    def expert_paths(self) -> Mapping[str, str]:
        """The folders or hub ids, by name, of the :attr:`experts` that come with the config."""
        return {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "config", strict: bool = True) -> PeftConfig:
        """Make the config that ``values`` (a parsed ``adapter_config.json``) describes.

        Raises:
            ConfigError: ``peft_type`` is missing, or a value is not of its kind.
            UnknownMethodError: no method answers to ``peft_type``.
            UnknownKeyError: a key is unknown and may change the maths (a warning when not ``strict``).
            UnsupportedError: a known option is on that this version does not have.
        """
        _check_origin(values, where)
        kind = config_class(values.get("peft_type"), where, cls)
        names = {f.name for f in dataclasses.fields(kind)} - NOT_IN_FILES
        known = {key: value for key, value in values.items() if key in names}
        extra = {key: value for key, value in values.items() if key not in names | NOT_IN_FILES}
        check_unknown_keys(extra, names, where, strict, kind.__name__)
        try:
            known = {key: value for key, value in known.items() if value is not None or key not in _PATTERNS}
            with patterns.matching():
                config = kind(**{**known, "peft_type": _peft_type(known["peft_type"])}, extra=extra)
        except ConfigError as error:
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from error
        except Exception as error:  # whatever a method's class makes of values that are none of its own
            raise ConfigError(f"{where}: {first_line(error)}.", hint="Compare it with a config that loads.") from error
        config.check_supported(where)
        return config

    @classmethod
    @takes(*SOURCE, *PAST_SOURCE, *IGNORED, renamed={**TOKEN, "pretrained_model_name_or_path": "path"})
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None, **source: Any) -> PeftConfig:
        """Read the config in an adapter folder or at a hub id.

        Args:
            path: the folder or id.
            revision: on the hub.
            **source: ``subfolder``, ``token``, ``local_files_only``, ``cache_dir``, ``force_download``; and keywords of
                peft without effect here.
        """
        folder = resolve(path, LookupOptions(revision=revision, **subset(source, SOURCE)), what="adapter")
        return cls.from_dict(folder.json(ADAPTER_CONFIG), where=f"{folder.origin}/{ADAPTER_CONFIG}")

    @classmethod
    def from_peft_type(cls, peft_type: PeftType | str | None = None, **options: Any) -> PeftConfig:
        """Make the config of a method, by default the class's own, with ``options``, which are fields of its class."""
        return config_class(cls.own_type if peft_type is None else peft_type, "from_peft_type", cls)(**options)

    @classmethod
    @takes(others=True)
    def check_kwargs(cls, **options: Any) -> dict[str, Any]:
        """Return options of the class, or of the method that their ``peft_type`` names, once they make a config."""
        kind = config_class(options.get("peft_type", cls.own_type), "check_kwargs", cls)
        kind(**options)
        return options

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """Return the JSON object of a file, without the options that are never in files."""
        values = read_json(Path(path_json_file))
        return {key: value for key, value in values.items() if key not in NOT_IN_FILES}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them; keys that are unknown here are in :attr:`extra`."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in NOT_IN_FILES}
        if values["peft_version"] is None:
            del values["peft_version"]
        return values

    def to_json(self, *, inference_mode: bool | None = None) -> str:
        """Return the text of ``adapter_config.json``: keys sorted, unknown ones included.

        Args:
            inference_mode: stands in the text in place of the config's own.
        """
        # Only the top level is sorted: of rank_pattern's keys the first match counts, so their order has meaning.
        values = {**self.extra, **self.to_dict()}
        if inference_mode is not None:
            values["inference_mode"] = inference_mode
        return json.dumps(dict(sorted(values.items())), indent=2) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` into ``folder``."""
        from veneer.files.atomic_write import atomic_write  # whose tempfile takes 3 ms of each `veneer inspect`

        with atomic_write(Path(folder) / ADAPTER_CONFIG) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def check_supported(self, where: str = "config") -> None:
        """Raise :class:`UnsupportedError` for options that this version does not support."""
        refused = [
            f"{name}={getattr(self, name)!r}"
            for name, values in self.supported_values.items()
            if getattr(self, name) not in values
        ]
        if refused:
            raise UnsupportedError(
                f"{where}: {self.peft_type} with {', '.join(refused)} is not available in this version of Veneer.",
                hint="Loading it without the option would compute something else, so it is refused.",
            )


@dataclass
class TargetedConfig(PeftConfig):
    """Config of a method that adapts layers of the base.

    Args:
        target_modules: what to adapt: module names or their dotted endings; a string is a regular expression
            that must match a whole name, or ``"all-linear"``; ``None`` takes the model type's usual choice.
        exclude_modules: names, endings or a regular expression to leave out; it wins over ``target_modules``.
        layers_to_transform: block indices to adapt; with ``layers_pattern``, the name of the list of blocks.
        layers_pattern: see ``layers_to_transform``.
        modules_to_save: modules that are trained whole and saved beside the adapter, such as a new head.
    """

    target_modules: Names | None = None
    exclude_modules: Names | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    # The options whose names have no order, and are a set, as in peft.
    unordered: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    # How the keys of options such as rank_pattern are matched with a layer's name.
    pattern_form: ClassVar[patterns.Form] = patterns.ENDING

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in dict.fromkeys((*TargetedConfig.unordered, *self.unordered, "modules_to_save")):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                # Sorted, so that equal sets have one text, by which plans are kept.
                setattr(self, name, {*sorted(value)} if name in self.unordered else _listed(value))
        self._check_patterns()
        self._check_blocks()

    def _check_blocks(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str.",
                    hint="Put the block index into the expression, or list the names.",
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
                hint=f"layers_pattern={self.layers_pattern!r} says nothing alone; leave both out, or give both.",
            )

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            patterns.check(name, getattr(self, name), patterns.WHOLE)
        blocks = self.layers_pattern
        for pattern in blocks if isinstance(blocks, list) else [blocks]:
            patterns.check("layers_pattern", pattern, patterns.BLOCK)
        for name, value in vars(self).items():
            if name.endswith("_pattern") and isinstance(value, Mapping):
                for pattern in value:
                    patterns.check(name, pattern, self.pattern_form)


@dataclass
class PromptConfig(PeftConfig):
    """Config of a method that puts virtual tokens before the input, or their keys and values into the cache.

    Args:
        num_virtual_tokens: how many.
        token_dim: the width of one; this option and those below are the model's own values where left out.
        num_transformer_submodules: 2 for an encoder-decoder, whose checkpoints hold as many tokens again.
        num_attention_heads: heads of a layer's keys.
        num_layers: layers that have keys.
        modules_to_save: modules that are trained whole and saved beside the prompt, such as a new head.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        check_at_least_one(self, "num_virtual_tokens", *sizes)

    @property
    def is_prompt_learning(self) -> bool:
        return True


# A method's config is one of the two.
AnyConfig = TargetedConfig | PromptConfig

_CONFIGS: dict[str, type[PeftConfig]] = {}


def register_config(peft_type: str, kind: type[PeftConfig]) -> None:
    """Read ``peft_type`` in a config file as ``kind``; a class that names its own does this itself."""
    _CONFIGS[peft_type] = kind


def registered() -> list[str]:
    """Return the ``peft_type`` of every method: Veneer's own, and those that a program has added."""
    return sorted({*(kind.value for kind in PeftType), *_CONFIGS})


def is_of_mlx(values: Mapping[str, Any]) -> bool:
    """Tell whether an ``adapter_config.json`` is one of MLX-LM, whose file has the same name and purpose as PEFT's."""
    return values.get("peft_type") is None and not _MLX_KEYS.isdisjoint(values)


def _check_origin(values: Mapping[str, Any], where: str) -> None:
    """Raise ``UnsupportedError`` for a config, or an option, of a layout that Veneer does not read."""
    if is_of_mlx(values):
        raise UnsupportedError(
            f"{where}: this is the config of an adapter of MLX-LM, and none of PEFT's.",
            hint="veneer.load and `veneer convert ADAPTER NEW` read the adapter's folder, with adapters.safetensors.",
        )
    if values.get("enable_lora"):
        raise UnsupportedError(
            f"{where}: enable_lora={values['enable_lora']!r} is LoRA on parts of a joined projection (MergedLinear "
            "of peft up to 0.2), whose tensors have other shapes; this version of Veneer does not read it.",
            hint="Load it with peft 0.2 and save its merged model, or train it again.",
        )


def config_class(peft_type: Any, where: str, asked: type[PeftConfig] | None = None) -> type[PeftConfig]:
    """Return the config class for a ``peft_type`` as it stands in a file; ``asked`` is the one that a user named."""
    if peft_type is None:
        named = (asked or PeftConfig).__name__
        raise ConfigTypeError(
            f"{where}: no peft_type. The {named} config that is trying to be loaded is missing required keys: "
            "{'peft_type'}.",
            hint='Add it, such as "peft_type": "LORA", if you know how the adapter was made.',
        )
    name = str(peft_type)
    if name not in _CONFIGS:
        if name not in registered():
            raise UnknownMethodError(
                f"{where}: peft_type {name!r} is unknown to this version of Veneer.",
                hint=did_you_mean(name.upper(), registered()) + f"Known: {', '.join(registered())}.",
            )
        # A file a method; its class registers itself.
        importlib.import_module(f"veneer.configs.methods.{name.lower()}")
    return _CONFIGS[name]


def check_unknown_keys(extra: Mapping[str, Any], known: set[str], where: str, strict: bool, kind: str) -> None:
    """Refuse unknown keys that change the maths, and warn of those that may.

    A key that is off (``None``, ``False``, empty) or only descriptive changes nothing and is kept silently. A switch
    that is on (``use_...``), or an option with a config of its own, is an error; any other value gives a warning.
    """
    on = {
        k: v for k, v in extra.items() if v not in (None, False, "") and v != {} and v != [] and k not in _DESCRIPTIVE
    }
    switches = [k for k, v in on.items() if v is True or k.startswith("use_") or k.endswith("_config")]
    for key in switches:
        message = f"{where}: {key}={on[key]!r} is unknown to this version of Veneer and may change the maths."
        if strict:
            raise UnknownKeyError(
                message,
                hint=did_you_mean(key, known)
                + "Remove the key if it changes nothing, or load with strict=False to ignore it.",
            )
        warn(message + " It is ignored.")
    unused = sorted(on.keys() - set(switches))
    if unused:
        shown = ", ".join(f"{key}={on[key]!r}" for key in unused)
        warn(
            f"Unexpected keyword arguments {unused} for class {kind}, these are ignored. {where}: {shown} stays "
            "in the config for other tools."
        )


def _peft_type(name: str) -> PeftType | str:
    """Return the ``PeftType`` of that name; the name itself for a method that a program has added."""
    return PeftType(name) if name in {t.value for t in PeftType} else name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _listed(names: Iterable[str]) -> list[str]:
    return sorted(names) if isinstance(names, (set, frozenset)) else list(names)


def as_any_config(config: PeftConfig) -> AnyConfig:
    """Return the config as one of the two kinds; raise ``UnsupportedError`` when it is neither."""
    return config if isinstance(config, PromptConfig) else targeted(config)


def targeted(config: PeftConfig) -> TargetedConfig:
    """Return the config as one that targets layers; raise ``UnsupportedError`` when it does not."""
    if not isinstance(config, TargetedConfig):
        raise UnsupportedError(
            f"{type(config).__name__} does not say which layers to adapt.", hint="Use a method's config: LoraConfig ..."
        )
    return config
