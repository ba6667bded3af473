"""Puts the LoRA of fused experts into the layout that PEFT has now, whatever its writer's was.

    now                     A (experts * r, in),  B (out, r * experts)
    Unsloth until 9/2026    A (experts * r, in),  B (out, experts * r): the columns of one expert lie side by side
    PEFT up to 0.18         A (experts * r, d1),  B (d2, r * experts) of a parameter (experts, d1, d2), which most
                            models have as (experts, out, in), gpt-oss as (experts, in, out)
    PEFT 0.19.0             A (experts * r, out), B (in, r * experts) of every model

Unsloth marks its files since then; those without the mark can be of either kind, and so the user has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.errors import UnsupportedError, UsageError
from veneer.formats.canonical import CanonicalAdapter, ModuleChange
from veneer.formats.format import Base
from veneer.formats.trainer_names import text_config

if TYPE_CHECKING:
    pass

MARK = "lora_B_layout"
# The mark's value -> the value of ``--experts``.
_MARKS = {"rank_major": "rank-major", "grouped_by_expert": "grouped"}
# PEFT writes its version since 0.18, and this key too; a file with the key and no version is of another writer.
_VERSION, _SINCE_0_18 = "peft_version", "ensure_weight_tying"


def is_in_question(values: Mapping[str, Any]) -> bool:
    """Tell by an adapter's config whether its experts may lie in another layout than PEFT's of now."""
    if not values.get("target_parameters") or values.get("peft_type") != "LORA":
        return False
    return values.get(MARK) not in (None, "rank_major") or _is_unmarked(values) or _is_old(values) is not False


def in_layout_of_now(
    adapter: CanonicalAdapter, values: Mapping[str, Any], base: Base | None, experts: str | None, origin: str
) -> CanonicalAdapter:
    """Return an adapter that was read from PEFT's files with its experts in the layout of now.

    Args:
        adapter: the adapter.
        values: its config as it is in the file.
        base: the base, which tells in from out; without one that is left as it is.
        experts: ``"grouped"`` or ``"rank-major"``, where the user says it.
        origin: its path, for errors.

    Raises:
        UsageError: the file may be of either kind, and the user has not said of which.
    """
    stacks = {path: change for path, change in adapter.modules.items() if _is_stack(change)}
    if not stacks:
        return adapter
    notes, changed = [], dict(stacks)
    if _order(values, experts, origin) == "grouped":
        changed = {path: _regrouped(change) for path, change in changed.items()}
        notes.append("The columns of the experts' lora_B were grouped by expert, and lie as PEFT has them now.")
    turned = _turned(stacks, values, base, origin)
    if turned:
        changed = {path: _turned_over(change) if path in turned else change for path, change in changed.items()}
        notes.append("The experts' factors were those of transposed parameters, as PEFT up to 0.19.0 had them.")
    is_marked = MARK in values or _is_of_unsloth(values)
    config = {key: value for key, value in (adapter.config or {}).items() if key != _VERSION or not turned}
    config |= {MARK: "rank_major"} if is_marked else {}
    return replace(adapter, modules={**adapter.modules, **changed}, config=config, notes=(*adapter.notes, *notes))


def _is_stack(change: ModuleChange) -> bool:
    down = change.leaves.get("lora_A.weight")
    return change.is_parameter and down is not None and down.shape[0] > change.rank


# -- the order of the columns of B -------------------------------------------------------------------------


def _order(config: Mapping[str, Any], experts: str | None, origin: str) -> str:
    """Return the order of the columns of B: as the user says, else as the mark does."""
    if experts is not None:
        return experts
    if _is_unmarked(config):
        raise unsaid_order(origin)
    mark = config.get(MARK, "rank_major")
    if mark not in _MARKS:
        raise UnsupportedError(
            f"{origin}: {MARK} is {mark!r}, which is not known.", hint=f"Known: {', '.join(_MARKS)}."
        )
    return _MARKS[mark]


def leaves_order_unsaid(values: Mapping[str, Any]) -> bool:
    """Tell whether a config is of Unsloth, adapts experts, and does not say how their columns lie."""
    return bool(values.get("target_parameters")) and _is_unmarked(values)


def unsaid_order(origin: str) -> UsageError:
    """Make the error for a file that may have the columns in either order."""
    return UsageError(
        f"{origin}: Unsloth laid out the LoRA of fused experts otherwise until September 2026, and the file does not "
        "say when it was made.",
        hint="Say it: --experts grouped if it was trained before, --experts rank-major if since: "
        f"veneer convert {origin} NEW --experts grouped",
    )


def _is_unmarked(config: Mapping[str, Any]) -> bool:
    return MARK not in config and _is_of_unsloth(config)


def _is_of_unsloth(config: Mapping[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    is_marked = isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))
    return is_marked or str(config.get("base_model_name_or_path") or "").startswith("unsloth/")


def _regrouped(change: ModuleChange) -> ModuleChange:
    up = change.leaves["lora_B.weight"]
    columns = up.unflatten(1, (-1, change.rank)).transpose(1, 2).flatten(1).contiguous()
    return replace(change, leaves={**change.leaves, "lora_B.weight": columns})


# -- in and out --------------------------------------------------------------------------------------------


def _turned(stacks: Mapping[str, ModuleChange], config: Mapping[str, Any], base: Base | None, origin: str) -> set[str]:
    """Return the parameters whose factors are those of the transposed parameter.

    The factors' widths tell it; of a square parameter other ones of the same file do, or the version that wrote it.
    """
    if base is None:
        return set()
    orientations = {path: _is_turned(change, base) for path, change in stacks.items()}
    unsure = {path for path, is_turned in orientations.items() if is_turned is None}
    turned = {path for path, is_turned in orientations.items() if is_turned}
    if not unsure or (len(unsure) < len(stacks) and not turned):
        return turned
    if turned:
        return {*turned, *unsure}
    is_old = _is_old(config)
    if is_old is None and not _is_stored_turned(base):
        raise UsageError(
            f"{origin}: {min(unsure)} is square, and PEFT exchanged in and out of experts until 0.19.0; the config "
            "does not say which version wrote it.",
            hint=f'Write the version into adapter_config.json: "{_VERSION}": "0.17.1"',
        )
    return unsure if is_old and (not _is_stored_turned(base) or _version(config) == (0, 19, 0)) else set()


def _is_turned(change: ModuleChange, base: Base) -> bool | None:
    """Tell by the width of A whether the factors are those of the transposed parameter; ``None`` if it is square."""
    shape, hidden = base.shapes.get(change.path, ()), text_config(base).get("hidden_size")
    if len(shape) != 3 or shape[1] == shape[2] or hidden not in shape[1:]:
        return None
    other = shape[1] if shape[2] == hidden else shape[2]
    inner = other if change.path.endswith("down_proj") else hidden
    return bool(change.leaves["lora_A.weight"].shape[1] != inner)


def _is_stored_turned(base: Base) -> bool:
    """Tell whether a base stores its experts as (experts, in, out)."""
    hidden = text_config(base).get("hidden_size")
    shapes = [shape for path, shape in base.shapes.items() if path.endswith(".gate_up_proj") and len(shape) == 3]
    return any(shape[1] == hidden != shape[2] for shape in shapes)


def _is_old(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a version of PEFT up to 0.19.0 wrote a config; ``None`` where that cannot be told."""
    version = _version(config)
    if version is None:
        return False if _SINCE_0_18 in config else None
    return version <= (0, 19, 0)


def _version(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get(_VERSION) or ""))
    return tuple(int(number or 0) for number in match.groups()) if match else None


def _turned_over(change: ModuleChange) -> ModuleChange:
    """Return a change with the factors of the parameter, given those of the transposed one."""
    from veneer.formats.experts import ExpertStack, change_of, stack_of

    stack = stack_of(change)
    return change_of(change.path, ExpertStack(stack.up.mT, stack.down.mT, stack.scale))
