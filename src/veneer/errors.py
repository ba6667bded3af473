"""The errors that Veneer raises on purpose.

    VeneerError
    ├── SourceError                 a path or hub id cannot be read
    │   ├── PathNotFoundError       nothing is there (also FileNotFoundError)
    │   ├── NotACheckpointError     something is there, but no model and no adapter
    │   ├── IncompleteCheckpointError   a part is missing: weights, config, a shard, or all tensors
    │   ├── CorruptFileError        truncated, or not what its name says
    │   └── PickleRefusedError      weights that only pickle can read
    ├── ConfigError                 adapter_config.json, or a config object (also ValueError)
    │   ├── ConfigTypeError         a value of the wrong type, or no peft_type (also TypeError)
    │   ├── UnknownMethodError      a peft_type that no method here answers to
    │   ├── UnknownKeyError         a key unknown here that may change the maths
    │   ├── UnsupportedError        known, and not available: a method's option, a kind of layer (also
    │   │   │                       NotImplementedError)
    │   │   ├── MixedBatchError         a layer that cannot run rows of several adapters (also TypeError)
    │   │   └── NotConvertibleError     an adapter that no LoRA can stand for (also MergeError, TypeError)
    │   └── UsageError              an argument of a command, or of a call, is not valid
    ├── TargetError                 a config's targets match nothing, or nothing usable (also ValueError)
    ├── BindError                   checkpoint and model do not fit; holds every problem
    │   └── StateMismatchError      a state dict does not fit the base model (also RuntimeError)
    ├── BaseModelError              the base: missing, not named, of the wrong kind, already adapted
    │   ├── BaseMismatchError       it is not the base that the adapter was trained on
    │   └── NoAdaptersError         it has no adapters, where some are needed (also ValueError)
    ├── AdapterError                the set of adapters on a model (also ValueError)
    │   ├── UnknownAdapterError     no adapter of that name
    │   ├── DuplicateAdapterError   the name is taken, or no valid name
    │   ├── BankFullError           the adapters that are leased leave no slot of a bank
    │   └── NonFiniteError          NaN or infinity among an adapter's values
    ├── MergeError                  a merge cannot be made (also ValueError)
    │   └── NoMergedFormError       no weight can hold what an adapter does (also NotImplementedError)
    ├── OutputError                 an output cannot be written there (also a SourceError, AdapterError and MergeError,
    │                               which it was called in earlier versions)
    ├── EngineError                 an engine of `veneer serve` cannot answer a request
    └── UnknownKeywordError         a keyword that a call does not take (also TypeError)

Every error says what is wrong and where in ``message``, and how to mend it in ``hint``; ``str(error)`` is
both. The command line prints that one line and leaves with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from veneer.printing import printable


class VeneerError(Exception):
    """Base of all errors. ``message`` says what is wrong and where, ``hint`` what to do about it.

    Both are made printable, so that text cited from a checkpoint cannot steer a terminal, not even in a traceback.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)
        super().__init__(f"{self.message} {self.hint}" if self.hint else self.message)


class SourceError(VeneerError):
    """A path or hub id cannot be read."""


class PathNotFoundError(SourceError, FileNotFoundError):
    """Nothing is at that path or hub id."""

    # OSError.__str__ would print its own (empty) errno form.
    __str__ = VeneerError.__str__


class NotACheckpointError(SourceError):
    """Something is there, but it is neither a model nor an adapter."""


class IncompleteCheckpointError(SourceError):
    """A part of the checkpoint is missing: its weights, its config, a shard, or every tensor."""


class CorruptFileError(SourceError):
    """A file is truncated, or is not what its name says."""


class PickleRefusedError(SourceError):
    """The weights are there only as pickle, which can run code; Veneer does not execute pickles."""


class ConfigError(VeneerError, ValueError):
    """An adapter's config is wrong, or asks for what Veneer does not support."""


class ConfigTypeError(ConfigError, TypeError):
    """A value in a config, or the module that it names, is of the wrong type; or the config has no ``peft_type``."""


class UnknownMethodError(ConfigError):
    """No method is registered for this ``peft_type``."""


class UnknownKeyError(ConfigError):
    """A config key that is unknown here and may change the maths."""


class UnsupportedError(ConfigError, NotImplementedError):
    """A method's option, or a kind of layer, that is known and not available here."""


class MixedBatchError(UnsupportedError, TypeError):
    """A layer cannot run rows of several adapters in one batch; a ``TypeError`` too, as in peft."""


class UsageError(ConfigError):
    """An argument of a command, or of a call, is not valid: no number, given twice, none of the choices."""


class TargetError(VeneerError, ValueError):
    """A config's targets match no module, or none that can carry an adapter."""


class BindError(VeneerError, RuntimeError):
    """A checkpoint and a model do not fit together. ``problems`` holds a line for each reason."""

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str | None = None) -> None:
        self.problems = tuple(printable(problem) for problem in problems)
        super().__init__(message, hint=hint)


class StateMismatchError(BindError, RuntimeError):
    """A state dict does not fit the base model; a ``RuntimeError`` too, as torch's own."""


class BaseModelError(VeneerError):
    """The base model is missing, not named, of the wrong kind, or already carries adapters."""


class NoAdaptersError(BaseModelError, ValueError, TypeError):
    """A model without adapters was given where one with adapters is needed; both kinds of error that peft raises."""


class BaseMismatchError(BaseModelError):
    """The base is not the one that the adapter was trained on."""


class AdapterError(VeneerError, ValueError):
    """Something is wrong with the set of adapters on a model."""


class UnknownAdapterError(AdapterError):
    """No adapter of that name is on the model."""


class DuplicateAdapterError(AdapterError):
    """The adapter's name is taken, or cannot be a name."""


class BankFullError(AdapterError):
    """The adapters that are leased leave no slot of a bank for another."""


class NonFiniteError(AdapterError):
    """An adapter holds NaN or infinite values."""


class MergeError(VeneerError, ValueError):
    """A merge cannot be made."""


class NoMergedFormError(MergeError, NotImplementedError):
    """No weight can hold an adapter's change, whatever the base; a ``NotImplementedError`` too, as in peft."""


class NotConvertibleError(UnsupportedError, MergeError, TypeError):
    """An adapter changes no weights, so that no LoRA can stand for it; a ``TypeError`` too, as in peft."""


class OutputError(SourceError, AdapterError, MergeError):
    """An output cannot be written where it was asked for: the place is taken, closed to writing, or full.

    It is all three of its parents because reports, conversions and merges raised one of them each in earlier versions.
    """


class EngineError(VeneerError):
    """An engine cannot answer a request: a step failed, it is being started anew, or it does not hold the adapter."""


class UnknownKeywordError(VeneerError, TypeError):
    """A public call was given a keyword that it does not take."""


def did_you_mean(name: str, known: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """Return the question whether the nearest known name was meant, and a space; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {shown(near[0])}? " if near else ""
