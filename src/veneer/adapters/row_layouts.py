"""Learns how each adapted layer sees the rows of a batch, at the first call whose rows differ.

The base runs on a few random tokens, and for layers which those do not reach, on the call's own input: once as it is,
and with one row changed. The entries of a layer's input that change with the row are its own. A call that needs a layer
of which this says nothing is refused before it begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.adapters import layout_probe
from veneer.adapters.call import Call
from veneer.adapters.known_layouts import Demands, Readiness
from veneer.base_model.media_rows import (
    TEXT_SPANS,
    call_of,
    doubled,
    first_rows,
    media_of,
    rows_of,
    shares_of,
    spans_of,
)
from veneer.base_model.model_call import taken_names
from veneer.configs.names import PeftType
from veneer.errors import AdapterError, VeneerError
from veneer.patches.row_layout import ONE_BY_ONE, ROWS, UNKNOWN, Fingerprints, Layout, differ, layout_of, refused
from veneer.patches.selection import NOTHING, Selection, wrong_count

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.collection import Adapters
    from veneer.layers.adapted_layer import AdaptedLayer
    from veneer.layers.module_copies import ModuleCopies


CallTensors = Mapping[str, Tensor]


class RowCheck:
    """Checks, before a call begins, that its layers see the rows as it needs.

    Args:
        adapters: of the model; their ``layouts`` hold the layouts that are learnt.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters, self.layouts = adapters, adapters.layouts

    def checked(self, selection: Selection, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Selection:
        """Return ``selection`` for a call of the model with these arguments.

        Raises:
            AdapterError: it names more or fewer rows than there are, or needs a layer that does not see the rows in
                a known order.
        """
        demands = self._by_place(Demands.of(selection))
        model = self.adapters.model
        call = call_of(model, taken_names(model), args, kwargs)
        rows = rows_of(model, call)
        if selection.rows is not None:
            _check_count(selection, rows, call)
        if selection.by_token:
            rows = None  # what holds for the rows of a batch holds for the tokens of one
            selection = replace(selection, kept=kwargs.get("logits_to_keep"))
        if not demands.names or rows == 1:
            return selection
        if not self._sees_images(demands, call, rows) or rows is None:
            return selection
        return replace(selection, shares=shares_of(model, call, rows))

    def check_compiled(self, demands: Demands) -> None:
        """Check the same for code that is being compiled, where tensors have no values."""
        if self._sees_images(self._by_place(demands), {}, None):
            raise AdapterError(
                "Compiled code does not follow images to the rows of their adapters.",
                hint="Call the model that is not compiled.",
            )

    def _by_place(self, demands: Demands) -> Demands:
        """Return the demands on those adapters whose layers have to know the rows."""
        if demands.mixed:
            return demands
        return demands._replace(names=tuple(name for name in demands.names if self._is_by_place(name, demands.tasks)))

    def _is_by_place(self, name: str, tasks: bool) -> bool:
        """Tell whether an adapter needs the row or token of each entry, even where all rows use it."""
        adapter = self.adapters.by_name[name]
        return self.adapters.acts_by_place(adapter) or (tasks and adapter.config.peft_type == PeftType.POLY)

    def _sees_images(self, demands: Demands, call: CallTensors, rows: int | None) -> bool:
        """Learn from the call, and tell whether one of its layers sees images."""
        answers = [self._checked(demands._replace(names=(name,)), call, rows) for name in demands.names]
        return any(ready.images for ready in answers)

    def _checked(self, demands: Demands, call: CallTensors, rows: int | None) -> Readiness:
        """Learn from the call, and return whether its layers meet the demands."""
        ready, media = self.layouts.ready.get(demands), frozenset(media_of(call))
        if ready is None or (ready.unreached and not media <= ready.media):
            entries = (self.adapters.by_name[name] for name in demands.names)
            places = dict(itertools.chain.from_iterable(map(self._places, entries)))
            self._learn(list(places), call, rows)
            layouts = [self.layouts.known.get(name) for name in places]
            images = any(layout is not None and layout.images for layout in layouts)
            seen = media if ready is None else media | ready.media
            ready = Readiness(self._unfit(demands), None in layouts, images, seen)
            self.layouts.ready[demands] = ready
        if ready.unfit is not None:
            raise refused(ready.unfit)
        return ready

    def _places(self, adapter: Adapter) -> Iterator[tuple[str, AdaptedLayer | ModuleCopies]]:
        """Yield the names of the modules that an adapter changes, with their wrappers."""
        yield from adapter.wrappers()
        for expert in adapter.config.experts:
            yield from self._places(self.adapters.by_name[expert])

    def _unfit(self, demands: Demands) -> str | None:
        for name in demands.names:
            by_place = self._is_by_place(name, demands.tasks)
            for place, wrapper in self._places(self.adapters.by_name[name]):
                layout = self.layouts.known.get(place, ROWS)
                plain = layout == ROWS or (demands.by_row and layout == Layout(dim=1))
                if layout == UNKNOWN or not wrapper.follows(layout) or (by_place and not plain):
                    return place
        return None

    # -- learning ------------------------------------------------------------------------------------------

    def _learn(self, places: list[str], call: CallTensors, rows: int | None) -> None:
        error: Exception | None = None
        if any(name not in self.layouts.known and name not in self.layouts.attempted for name in places):
            error = self._learn_from_text()
        missing = [name for name in places if name not in self.layouts.known]
        if missing and (error is not None or media_of(call)):
            self._learn_from_call(missing, call, rows, error)
        for name, wrapper in self._wrappers():
            wrapper.layout = self.layouts.known.get(name, UNKNOWN)

    def _learn_from_text(self) -> Exception | None:
        """Run the base on random tokens, and return the error where it does not take them."""
        model, modules = self.adapters.model, self._modules()
        try:
            with Call(self.adapters, NOTHING):  # nobody merges meanwhile
                seen = layout_probe.observed(model, modules, layout_probe.text_calls(model))
        except Exception as error:
            return error
        usual, *others = seen
        self._note(usual, others, layout_probe.CHANGED_ROWS, (1,) * layout_probe.ROWS, images=False, names=usual.keys())
        self.layouts.attempted |= modules.keys() - self.layouts.known.keys()
        return None

    def _learn_from_call(
        self, missing: list[str], call: CallTensors, rows: int | None, error: Exception | None
    ) -> None:
        """Run the base on a call's own input."""
        model = self.adapters.model
        if rows is None or not call:
            raise _cannot(missing[0], error)
        shares = shares_of(model, call, rows)
        if shares is None:
            call, rows = first_rows(call, rows, layout_probe.ROWS), min(rows, layout_probe.ROWS)
        elif sum(map(bool, shares)) == 1:
            call, rows, shares = doubled(call, shares), 2, (1, 1)
        images = spans_of(call, rows, shares)
        text = {} if shares is None else TEXT_SPANS
        modules = {name: module for name, module in self._modules().items() if name in missing}
        calls = layout_probe.own_calls(model, dict(call), [*images.values(), *text.values()])
        try:
            with Call(self.adapters, NOTHING):  # nobody merges meanwhile
                seen = layout_probe.observed(model, modules, calls)
        except VeneerError:
            raise
        except Exception as failed:
            raise _cannot(missing[0], failed) from failed
        usual, by_image, by_text = seen[0], seen[1 : 1 + len(images)], seen[1 + len(images) :]
        # A layer that the tokens reach has their rows, in a model with images too.
        of_text = {name for name in usual if any(differ(usual[name], other.get(name, [])) for other in by_text)}
        self._note(usual, [*by_text, *by_image], [*text, *images], (1,) * rows, images=False, names=of_text)
        self._note(usual, by_image, list(images), shares or (1,) * rows, shares is not None, usual.keys() - of_text)
        lost = [name for name in missing if self.layouts.known.get(name) == UNKNOWN]
        for name in lost:  # another call may have its rows in order
            del self.layouts.known[name]
        if lost:
            raise refused(lost[0])

    def _note(
        self,
        usual: Mapping[str, Fingerprints],
        others: Sequence[Mapping[str, Fingerprints]],
        changed: Sequence[int],
        shares: tuple[int, ...],
        images: bool,
        names: Collection[str],
    ) -> None:
        for name in names:
            fingerprints = [other.get(name, []) for other in others]
            self.layouts.known[name] = layout_of(usual[name], fingerprints, changed, shares, images)

    def _modules(self) -> dict[str, nn.Module]:
        """Return the wrappers of adapted modules of which nothing is known, by name."""
        return {name: self.adapters.standing_at(name) for name, _ in self._wrappers() if name not in self.layouts.known}

    def _wrappers(self) -> Iterator[tuple[str, AdaptedLayer | ModuleCopies]]:
        yield from ((layer.site.name, layer) for layer in self.adapters.adapted_layers)
        yield from self.adapters.module_copies.items()


def _check_count(selection: Selection, rows: int | None, call: CallTensors) -> None:
    if selection.by_token:
        ids = call.get("input_ids")
        rows = None if ids is None or ids.ndim != 2 or len(ids) != 1 else ids.shape[1]
    if rows is not None and rows != selection.entries:
        raise wrong_count(selection, rows)


def _cannot(layer: str, error: Exception | None) -> AdapterError:
    why = "" if error is None else f" ({type(error).__name__}: {error})"
    return AdapterError(
        f"In which order {layer} sees the rows of a batch could not be found out{why}, so they cannot use different "
        "adapters.",
        hint=ONE_BY_ONE,
    )
