"""Checks an engine by itself: its lane at the start, and in a mixed batch each kind of adapter that it loads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.errors import AdapterError, EngineError
from veneer.patches.selection import BASE
from veneer.peft_model.peft_model import PeftModel
from veneer.printing import first_line
from veneer.serving.engine_types import EngineRequest, Sampling, TokenEvent
from veneer.serving.job import Job
from veneer.serving.lane import Lane

_TOKENS = 8
_POLL = 0.1
# The most that two ways to compute the same logits may differ, relative to their norm; another adapter's are far off.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.05
# In half precision an adapter of large effect may make more of the rounding; what lies nearer to it than to the base is
# still its own.
_SHARE_OF_EFFECT = 0.75
# An adapter that changes less than this does nothing.
_NO_CHANGE = 1e-6


# What a config says of where an adapter comes from, and nothing of how it computes.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


class Canary:
    """Compares the logits of a few tokens, computed in a mixed batch and alone.

    Adapters of one kind have the same config, and tensors of the same places, shapes and dtypes: they are computed by
    the same code, with other numbers. The first of a kind that changes something is checked.

    Args:
        model: of the engine.
        lane: that it stands still for.
        pause: keeps the lane between two steps; each step of the canary runs inside, and no longer.
    """

    def __init__(self, model: PeftModel, lane: Lane, pause: Callable[[], AbstractContextManager[None]]) -> None:
        self.model, self.lane, self.pause = model, lane, pause
        self.tokens = _random_tokens(model).to(model.device)
        self._sound: set[str] = set()

    def check(self, name: str) -> bool:
        """Check an adapter, unless one of its kind passed; tell whether it changes what the base computes.

        Raises:
            AdapterError: the results differ, or are not finite.
            VeneerError: the adapter cannot run in a mixed batch.
        """
        adapter = self.model.adapters.get(name)
        kind = _kind(adapter)
        if kind in self._sound:
            return adapter.changes_something
        with self.pause():
            mixed = self._mixed(name)
        with self.pause():
            alone = self._alone(name)
        if not bool(mixed.isfinite().all()):
            raise AdapterError("The adapter's logits are not finite.", hint="Check its tensors: veneer inspect.")
        gap, effect = difference(mixed, alone), difference(self.base, alone)
        rounds_coarsely = self.model.dtype not in _TOLERANCE
        if not gap <= max(tolerance(self.model), effect * _SHARE_OF_EFFECT if rounds_coarsely else 0.0):
            raise AdapterError(
                f"The adapter computes other logits in a mixed batch than alone: they differ by {gap:.2g} of "
                "their norm.",
                hint="It cannot be served; report it with the adapter's config.",
            )
        changes = effect > _NO_CHANGE
        if changes:  # the base in the place of one that does nothing would pass, too
            self._sound.add(kind)
        return changes

    @cached_property
    def base(self) -> Tensor:
        """The base's own logits."""
        with self.pause():
            return self._alone(BASE)

    def _mixed(self, adapter: str) -> Tensor:
        tokens = self.tokens.repeat(2)[None] if self.lane.packed else self.tokens.repeat(2, 1)
        with self.lane.bank.lease(adapter, needs_slots=False) as lease:
            return self._logits(tokens, self.lane.bank.plan(self._parts(lease, None)))

    def _parts(self, *owners: Any) -> list[Any]:
        return [(owner, _TOKENS) for owner in owners] if self.lane.packed else list(owners)

    def _alone(self, adapter: str) -> Tensor:
        chosen = self.model.disable_adapter() if adapter == BASE else self.model.using(adapter)
        with chosen:
            return self._logits(self.tokens[None], None)

    @torch.no_grad()
    def _logits(self, tokens: Tensor, names: Any) -> Tensor:
        """Return the logits of the first sequence, in float32."""
        output = self.model(input_ids=tokens, adapter_names=names, use_cache=False)
        return output.logits[0, :_TOKENS].float()  # type: ignore[no-any-return]


def _kind(adapter: Adapter) -> str:
    """Return a digest of all that adapters have in common which the same code computes."""
    config = {name: value for name, value in adapter.config.to_dict().items() if name not in _ORIGIN}
    tensors = [(place, *tensor.shape, tensor.dtype) for place, tensor in adapter.tensors_by_place().items()]
    return hashlib.sha256(repr((config, tensors)).encode()).hexdigest()


def tolerance(model: PeftModel) -> float:
    """Return the relative gap that rounding may make in a model's dtype."""
    return _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)


def difference(logits: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to that of the second."""
    return float((logits - other).norm() / other.norm().clamp(min=torch.finfo(torch.float32).tiny))


def lane_fault(lane: Lane, model: PeftModel) -> str | None:
    """Start a lane and let it answer a short prompt; return why it cannot be used, if so."""
    try:
        lane.start()
        job, tokens = _first_answer(lane, model)
        expected = _expected(lane, model, tokens)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if job.logits is None or not difference(job.logits, expected) <= tolerance(model):
        return "its logits are not the model's"
    return None


def _expected(lane: Lane, model: PeftModel, tokens: list[int]) -> Tensor:
    """Return the base's logits behind the last token."""
    with lane.paused(), model.disable_adapter(), torch.no_grad():
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    return output.logits[0, -1].float()  # type: ignore[no-any-return]


def _first_answer(lane: Lane, model: PeftModel) -> tuple[Job, list[int]]:
    """Return a job that generated two tokens, and the tokens that the second was predicted from."""
    prompt = tuple(_random_tokens(model).tolist())
    events: list[TokenEvent | EngineError] = []
    request = EngineRequest("canary", prompt, None, Sampling(max_tokens=2, temperature=0.0, ignore_eos=True))
    job = Job(request, events.append, keeps_logits=True)
    lane.submit(job)
    while not job.ended:
        lane.deliver(_POLL)
        if lane.failure is not None:
            raise lane.failure
    tokens = [event.token for event in events if isinstance(event, TokenEvent) and event.token is not None]
    return job, [*prompt, *tokens[:1]]


def _random_tokens(model: PeftModel) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Special tokens, which may stand for images, are the first or the last.
    span = vocabulary // 4, vocabulary // 2
    return torch.randint(*span, (_TOKENS,), generator=torch.Generator().manual_seed(0))
