"""Patches: an adapter's change to the weight and bias of one layer, applied or merged.

For a layer ``y = W x + b`` a patch is

    W' = O (W I + scale * U V + D)        b' = b + c, or O b + c

``I`` and ``O`` are square multipliers on the input and the output side, ``U V`` is low-rank, ``D`` is any matrix, ``c``
a vector. A method lowers its tensors to a patch; everything else (the layer, the merge, the mixed batch) knows only
patches. Several patches on one layer apply one after the other, in the order of the selection: the second changes
the weight that the first has made. Merged and unmerged are the same composition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.errors import MergeError
from veneer.patches.layer_form import LayerForm
from veneer.patches.low_rank_autograd import scaled, updated
from veneer.patches.multipliers import Diagonal, Multiplier
from veneer.patches.operators import DenseMatrix, LinearOperator
from veneer.patches.plain_calls import is_captured, is_eager, plain_linear
from veneer.patches.route import Route
from veneer.patches.seeded_dropout import dropped, seeds_dropout
from veneer.patches.token_gate import TokenGate

GATED = "An adapter that acts on some tokens only (alora_invocation_tokens) cannot be a part of a weight."


@dataclass(frozen=True)
class Tokens:
    """New vectors for some tokens of an embedding or output layer.

    Attributes:
        index: the tokens, shape ``(n,)``, int64, ascending.
        values: the tokens' vectors, shape ``(n, dim)``.
        rows: whether a token is a row of the canonical weight (an output layer) or a column (an embedding).
        padding: the one of ``values`` that a look-up does not train; all are trained when ``None``.
    """

    index: Tensor
    values: Tensor
    rows: bool
    padding: int | None = None


@dataclass(frozen=True)
class Patch:
    """Holds the change of one layer; any part may be left out. For a stack of matrices tensors have a dimension more.

    Attributes:
        up: ``U``, shape ``(out, r)``.
        down: ``V``, shape ``(r, in)``.
        scale: multiplies ``U V``.
        dropout: the share of the input to ``U V`` and ``D`` that is dropped while training.
        dense: ``D``, shape ``(out, in)``; a linear layer's may be an operator, cheaper than a matrix.
        inner: ``I``.
        outer: ``O``.
        outer_on_bias: whether ``O`` multiplies the bias too.
        shift: ``c``, shape ``(out,)``.
        tokens: vectors that replace some of the weight's.
        drop: returns the patch for one training step, for dropout of other kinds.
        gate: chooses the positions of the input on which the patch acts; without one it acts on all. A patch with a
            gate has no merged form.
        route: adds a change that depends on the input. A patch with a route has no merged form.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    dense: Tensor | LinearOperator | None = None
    inner: Multiplier | None = None
    outer: Multiplier | None = None
    outer_on_bias: bool = False
    shift: Tensor | None = None
    tokens: Tokens | None = None
    drop: Callable[[Patch], Patch] | None = None
    gate: TokenGate | None = None
    route: Route | None = None

    def changes(self) -> bool:
        """Tell whether the patch can change anything: false for a freshly made or an all-zero adapter."""
        low_rank = (
            self.up is not None
            and self.down is not None
            and self.scale != 0
            and bool(self.up.count_nonzero())
            and bool(self.down.count_nonzero())
        )
        shifted = self.shift is not None and bool(self.shift.count_nonzero())
        operator = self.operator
        added = operator is not None and operator.changes()
        turned = any(multiplier is not None and multiplier.changes() for multiplier in (self.inner, self.outer))
        routed = self.route is not None and self.route.changes()
        return low_rank or shifted or added or turned or routed or self.tokens is not None

    @property
    def operator(self) -> LinearOperator | None:
        """``D`` as an operator, whether it was given as one or as a matrix."""
        return DenseMatrix(self.dense) if isinstance(self.dense, Tensor) else self.dense

    @property
    def low_rank(self) -> bool:
        """True if the patch has a part ``U V``."""
        return self.up is not None

    @property
    def nbytes(self) -> int:
        """The memory that its tensors take."""
        return _nbytes(self)

    @property
    def only_adds(self) -> bool:
        """True if the patch is only ``U V`` and ``c``, so that several patches add up."""
        return all(part is None for part in (self.dense, self.inner, self.outer, self.tokens, self.gate, self.route))

    @property
    def by_rows(self) -> bool:
        """True if each block of the weight's rows can be changed without the others."""
        return self.outer is None or self.outer.is_diagonal

    def at(self, index: int) -> Patch:
        """Return the patch of one matrix of a stack."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("up", "down", "shift"):
            parts[name] = None if parts[name] is None else parts[name][index]
        for name in ("inner", "outer"):
            parts[name] = None if parts[name] is None else parts[name].at(index)
        return Patch(**{**parts, "dense": None if self.operator is None else self.operator.at(index)})

    def scaled(self, weight: float) -> Patch | None:
        """Return the patch whose change is ``weight`` times this one's; ``None`` where the change is no sum."""
        added = ("up", "down", "scale", "dropout", "dense", "shift", "drop")
        if any(getattr(self, f.name) is not f.default for f in fields(self) if f.name not in added):
            return None
        operator = self.operator
        dense = None if operator is None else operator.scaled(weight)
        shift = None if self.shift is None else self.shift * weight
        return replace(self, scale=self.scale * weight, dense=dense, shift=shift)

    def take(self, rows: Tensor, whole: torch.Size) -> Patch:
        """Return the patch for some rows of a batch whose input has the leading shape ``whole``."""
        if self.gate is None and self.route is None:
            return self
        gate = None if self.gate is None else self.gate.take(rows, whole)
        return replace(self, gate=gate, route=None if self.route is None else self.route.take(rows, whole))

    # -- merging -------------------------------------------------------------------------------------------

    def changed_rows(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop`` of a canonical weight with this patch, from float32 ``rows`` without.

        ``rows`` may be changed in place where no gradient is wanted.
        """
        if self.gate is not None:
            raise MergeError(GATED, hint="Keep the adapter unmerged.")
        assert self.route is None
        in_place = not torch.is_grad_enabled()
        if self.inner is not None:
            rows = self.inner.rows(rows)
        if self.up is not None and self.down is not None:
            up, down = self.up[..., start:stop, :].float(), self.down.float()
            if in_place and rows.ndim == 2:
                rows = rows.addmm_(up, down, alpha=self.scale)
            else:
                rows = rows + self.scale * (up @ down)
        operator = self.operator
        if operator is not None:
            rows = rows + operator.rows(start, stop).float()
        if self.outer is not None:
            rows = self.outer.left_rows(rows, start, stop)
        return rows if self.tokens is None else _with_tokens(self.tokens, rows, start, stop)

    def changed_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return a float32 bias, shape ``(out,)``, with this patch; ``None`` is a bias of zero."""
        if bias is not None and self.outer is not None and self.outer_on_bias:
            bias = self.outer.apply(bias)
        if self.shift is None:
            return bias
        return self.shift.float() if bias is None else bias + self.shift.float()

    # -- applying ------------------------------------------------------------------------------------------

    def changed_output(self, y: Tensor, x: Tensor, bias: Tensor | None, site: LayerForm, training: bool) -> Tensor:
        """Return the layer's output with this patch, from its output without.

        Args:
            y: the layer's output with the patches before this one.
            x: the input that this patch sees.
            bias: the part of ``y`` that is bias, shape ``(out,)``.
            site: the layer.
            training: whether dropout is on.

        It is computed in the wider of the dtypes, so that neither is rounded first.
        """
        if training and self.dropout and x.is_floating_point():
            x = dropped(x, self.dropout) if self._has_node_form(site) else F.dropout(x, self.dropout)
        before = y
        if self.up is not None and self.down is not None:
            y = y + self._low_rank_output(x, y, site)
        operator = self.operator
        if operator is not None:
            dtype = torch.promote_types(y.dtype, operator.dtype)
            y = y + operator.output(_as(x, dtype), site, dtype)
        if self.route is not None:
            y = y + self.route(x, training)
        if self.outer is not None:
            y = self.outer.apply(y.movedim(site.channel, -1)).movedim(-1, site.channel)
        shift = self._shift_of(bias)
        if shift is not None:
            y = y + site.expand(shift, y)
        if self.tokens is not None:
            y = _tokens_output(self.tokens, y, x, site)
        return y if self.gate is None else self.gate.choose(y, before)

    def _low_rank_output(self, x: Tensor, y: Tensor, site: LayerForm) -> Tensor:
        assert self.up is not None
        assert self.down is not None
        dtype = torch.promote_types(y.dtype, self.up.dtype)
        hidden = site.product(_as(x, dtype), self.down.to(dtype))
        # The smaller of the two outputs is scaled, which a training step does again backwards.
        return site.mix(hidden if self.scale == 1 else hidden * self.scale, self.up.to(dtype))

    def _shift_of(self, bias: Tensor | None) -> Tensor | None:
        """Return what is added to ``O y``: ``c``, and the part of the bias that ``O`` must not change."""
        if bias is None or self.outer is None or self.outer_on_bias:
            return self.shift
        # Taking the bias off ``y`` first would take a copy of that.
        rest = bias - self.outer.apply(bias)
        return rest if self.shift is None else rest + self.shift

    # -- applying in training ------------------------------------------------------------------------------

    def is_node(self, x: Tensor, site: LayerForm, training: bool) -> bool:
        """Tell whether autograd can, and should, take the patch as one node: see :meth:`node_output`."""
        if self.up is None or self.down is None or not self._has_node_form(site):
            return False
        if not self.down.requires_grad:  # autograd by itself keeps nothing of ``x`` then
            return False
        drops = training and self.dropout > 0
        return (
            is_eager(x, self.up, self.down)
            and not (drops and not seeds_dropout(x, self.dropout))
            and not (self.outer is not None and is_captured(x))
        )

    @property
    def only_adds_product(self) -> bool:
        """True if the patch is ``W + s U V`` and nothing more, with a plain number ``s``."""
        others = (self.inner, self.dense, self.outer, self.shift, self.tokens, self.drop, self.gate, self.route)
        return self.up is not None and isinstance(self.scale, float | int) and not any(o is not None for o in others)

    def _has_node_form(self, site: LayerForm) -> bool:
        """Tell whether the patch is ``O (W I + s U V)`` and ``c``, with a diagonal ``O``, on a layer of matrices."""
        return (
            site.matrix_input
            and self.up is not None
            and all(part is None for part in (self.dense, self.tokens, self.gate, self.route))
            and (self.outer is None or isinstance(self.outer, Diagonal))
        )

    def node_output(
        self, y: Tensor | nn.Linear, x: Tensor, bias: Tensor | None, training: bool, dtype: torch.dtype | None
    ) -> Tensor:
        """Return :meth:`changed_output` as nodes of autograd that keep ``x`` and, to scale it, the output.

        Args:
            y: the layer's output with the patches before this one, or a :func:`plain_linear` layer that gives it.
            x: the input that this patch sees.
            bias: the part of ``y`` that is bias, shape ``(out,)``.
            training: whether dropout is on.
            dtype: that the output is rounded to in the end; ``None`` where another patch follows.
        """
        assert self.up is not None
        assert self.down is not None
        shift, share = self._shift_of(bias), self.dropout if training else 0.0
        only_adds = self.outer is None and shift is None
        y = updated(x, y, self.up, self.down, self.scale, share, rounds=only_adds and dtype is not None)
        if isinstance(self.outer, Diagonal):
            return scaled(y, self.outer.values, shift, dtype or y.dtype)
        return y if shift is None else y + shift


def _nbytes(value: Any) -> int:
    if isinstance(value, (Tensor, LinearOperator)):
        return value.nbytes
    if is_dataclass(value):
        return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
    return sum(map(_nbytes, value)) if isinstance(value, (tuple, list)) else 0


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``; token ids stay as they are."""
    return x.to(dtype) if x.is_floating_point() else x


def _with_tokens(tokens: Tokens, rows: Tensor, start: int, stop: int) -> Tensor:
    values = tokens.values.float()
    if not tokens.rows:
        return rows.index_copy(-1, tokens.index, values.T[start:stop])
    here = (tokens.index >= start) & (tokens.index < stop)
    return rows.index_copy(-2, tokens.index[here] - start, values[here])


def _tokens_output(tokens: Tokens, y: Tensor, x: Tensor, site: LayerForm) -> Tensor:
    values = tokens.values.to(torch.promote_types(y.dtype, tokens.values.dtype))
    if tokens.rows:
        return y.to(values.dtype).index_copy(-1, tokens.index, F.linear(x.to(values.dtype), values))
    place = torch.searchsorted(tokens.index, x).clamp(max=len(tokens.index) - 1)
    is_listed = (tokens.index[place] == x).unsqueeze(-1)
    return torch.where(is_listed, site.vectors(place, values, tokens.padding), y)


def for_training(patches: Sequence[Patch]) -> list[Patch]:
    """Return ``patches`` for one training step, each with its own kind of dropout applied."""
    return [patch if patch.drop is None else patch.drop(patch) for patch in patches]


def whole_weight(site: LayerForm, patches: Sequence[Patch]) -> bool:
    """Tell whether ``patches`` can be applied to this layer only by changing its whole weight first."""
    if site.shift_only:
        return False
    return not site.products or (not site.matrix_input and any(p.inner is not None for p in patches))


def biases(bias: Tensor | None, patches: Sequence[Patch]) -> list[Tensor | None]:
    """Return the bias before each patch and after the last, in float32."""
    steps = [None if bias is None else bias.float()]
    for patch in patches:
        steps.append(patch.changed_bias(steps[-1]))
    return steps


def apply(
    site: LayerForm,
    bias: Tensor | None,
    base: Callable[..., Any],
    patches: Sequence[Patch],
    training: bool,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return the layer's output under ``patches``, one after the other, rounded once to the base output's dtype.

    Args:
        site: the layer; its weight is changed output-wise, never as a whole (see :func:`whole_weight`).
        bias: the layer's bias, shape ``(out,)``.
        base: the layer's own forward pass, bias included.
        patches: in the order of the selection.
        training: whether dropout is on.
        x: the layer's input.
        *args: its other positional arguments.
        **kwargs: its keyword arguments.
    """
    seen, dtype = [x], x.dtype
    for patch in reversed(patches):
        if patch.inner is not None:
            x = patch.inner.apply(x)
        seen.append(x)
    total, dtype = _base_output(base, patches, site, training, _as(seen.pop(), dtype), *args, **kwargs)
    needs_bias = any(p.outer is not None and not p.outer_on_bias for p in patches)
    steps = biases(bias, patches) if needs_bias else [None] * len(patches)
    for patch, bias_before in zip(patches, steps, strict=False):
        x = seen.pop()
        # A layer stands for the output where the first patch is known to be a node.
        if isinstance(total, nn.Linear) or patch.is_node(x, site, training):
            total = patch.node_output(total, x, bias_before, training, None if len(patches) > 1 else dtype)
        else:
            total = patch.changed_output(total, x, bias_before, site, training)
    assert isinstance(total, Tensor)
    return total.to(dtype)


def _base_output(
    base: Callable[..., Any],
    patches: Sequence[Patch],
    site: LayerForm,
    training: bool,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor | nn.Linear, torch.dtype]:
    """Return the base layer's output, or the layer where the first patch computes that too; and the output's dtype."""
    if patches and patches[0].inner is None and patches[0].is_node(x, site, training):
        linear = plain_linear(base, x)
        if linear is not None:
            return linear, linear.weight.dtype
    y: Tensor = base(x, *args, **kwargs)
    return y, y.dtype


def apply_rows(y: Any, run: Callable[..., Any], groups: Mapping[str, Tensor], x: Tensor, *args: Any, **kw: Any) -> Any:
    """Return the output of a batch whose rows use different adapters.

    Args:
        y: the base's output for all rows.
        run: returns the output of some rows under one adapter: ``run(name, y of the rows, x of the rows, ...)``.
        groups: adapter's name -> the indices of its rows, shape ``(n,)``, int64. Rows in no group keep ``y``.
        x: the layer's input; the rows lie along its first dimension, and so they do in ``args``.
        *args: the layer's other positional arguments.
        **kw: the layer's keyword arguments.
    """
    length = x.shape[0]
    for name, rows in groups.items():
        others = [_take(value, rows, length) for value in args]
        named = {key: _take(value, rows, length) for key, value in kw.items()}
        changed = run(name, _take(y, rows, length), x[rows], *others, **named)
        y = _put(y, rows, changed, x)
    return y


def _take(value: Any, rows: Tensor, length: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_take(part, rows, length) for part in value)
    by_row = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == length
    return value[rows] if by_row else value


def _put(y: Any, rows: Tensor, changed: Any, x: Tensor) -> Any:
    """Return an output with some rows from ``changed``; routers of experts return a row for each token of ``x``."""
    if isinstance(y, tuple):
        return tuple(_put(a, rows, b, x) for a, b in zip(y, changed, strict=True))
    if not isinstance(y, Tensor):
        return y
    if x.ndim > 2 and len(y) == len(x) * x.shape[1] != len(x):
        rows = (rows[:, None] * x.shape[1] + torch.arange(x.shape[1], device=rows.device)).flatten()
    return y.index_copy(0, rows, changed.to(y.dtype))
