"""Tells which rows of a batch its images, videos and sounds belong to.

Models that take images beside text take those of all rows in one tensor; the tokens of a row say how many of its
entries are the row's. A larger image has more entries and more tokens, except in some families, whose calls give the
sizes of the images: with those, all rows have to be alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AdapterError
from veneer.patches.row_layout import ROWS, owners

_TOKEN = ("token_id", "token_index")

# The spans (see spans_of) of the text alone, for the first two rows.
TEXT_SPANS = {row: {"input_ids": slice(row, row + 1)} for row in (0, 1)}


def media_of(call: Mapping[str, Tensor]) -> list[str]:
    """Return the arguments of a call that hold images, videos or sounds."""
    return [
        name for name, value in call.items() if value.is_floating_point() and value.ndim > 1 and not _is_by_token(name)
    ]


def _is_by_token(name: str) -> bool:
    """Tell whether an argument has values for tokens, not for images."""
    return name.startswith(("decoder_", "past_key_")) or any(
        part in name for part in ("mask", "label", "embeds", "token_")
    )


def shares_of(model: nn.Module, call: Mapping[str, Tensor], rows: int) -> tuple[int, ...] | None:
    """Return the rows' shares of a call's images; ``None`` where each argument has one entry a row.

    Raises:
        AdapterError: the call does not tell.
    """
    media, ids = media_of(call), call.get("input_ids")
    if not media:
        return None
    counts = [] if ids is None or len(ids) != rows else _counted(model, media, ids)
    if not counts:
        if all(len(call[name]) == rows for name in media):
            return None
        raise _unclear(media, f"the batch has {rows} rows, and {media[0]} {len(call[media[0]])} entries")
    alike = all(len(set(by_row)) == 1 for by_row in counts)
    if not alike and len(counts) > 1:
        raise _unclear(media, "rows have other numbers of images and of videos")
    lone = not alike and sum(map(bool, counts[0])) == 1  # all are this row's, whatever their sizes
    sized = next((name for name in _sizes(call) if not alike or not _same(call[name], rows)), None)
    if sized is not None and not lone:
        raise _unclear(media, f"the rows differ in their images, and {sized} gives these sizes of their own")
    return (1,) * rows if alike else counts[0]


def _counted(model: nn.Module, media: list[str], ids: Tensor) -> list[tuple[int, ...]]:
    """Return, for each kind of media, the number of its tokens in each row; nothing where a kind has none."""
    by_kind = []
    for kind in dict.fromkeys(map(_kind, media)):
        tokens = [getattr(model.config, f"{kind}_{ending}", None) for ending in _TOKEN]
        token = next((token for token in tokens if isinstance(token, int)), None)
        counts = () if token is None else tuple((ids == token).sum(1).tolist())
        if not any(counts):
            return []
        by_kind.append(counts)
    return by_kind


def _kind(name: str) -> str:
    if "video" in name:
        return "video"
    return "audio" if "audio" in name or "input_features" in name else "image"


def _sizes(call: Mapping[str, Tensor]) -> list[str]:
    """Return the arguments that give sizes of images, but for grids of patches, whose size is that of the tokens."""
    integers = [name for name, value in call.items() if not value.is_floating_point() and not _is_by_token(name)]
    return [name for name in integers if name not in ("input_ids", "position_ids") and not name.endswith("grid_thw")]


def _same(value: Tensor, rows: int) -> bool:
    """Tell whether all rows have the same part of ``value``."""
    if value.ndim == 0 or len(value) % rows:
        return value.ndim == 0
    parts = value.reshape(rows, -1)
    return bool((parts == parts[:1]).all())


def spans_of(call: Mapping[str, Tensor], rows: int, shares: tuple[int, ...] | None) -> dict[int, dict[str, slice]]:
    """Return row -> argument -> the row's entries, for the first two rows that have any."""
    media = media_of(call)
    if shares is None:
        names = [name for name, value in call.items() if name in media or name.endswith("input_ids")]
        return {row: {name: slice(row, row + 1) for name in names if len(call[name]) == rows} for row in (0, 1)}
    chosen = [row for row, share in enumerate(shares) if share][:2]
    return {row: {name: _part(call[name], name, row, shares) for name in media} for row in chosen}


def _part(value: Tensor, name: str, row: int, shares: tuple[int, ...]) -> slice:
    if value.ndim > 4 and len(value) == len(shares):  # (rows, images, channels, height, width)
        return slice(row, row + 1)
    owner = owners(ROWS, len(value), shares)
    if owner is None:
        raise _unclear([name], f"its {len(value)} entries do not divide as the rows' tokens, {list(shares)}")
    start = owner.index(row)
    return slice(start, start + owner.count(row))


def doubled(call: Mapping[str, Tensor], shares: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a call of two equal rows, from one in which a single row has images."""
    row = next(row for row, share in enumerate(shares) if share)
    by_row = [name for name, value in call.items() if _is_by_row(name, value, len(shares))]
    return {
        name: value[[row, row]] if name in by_row else torch.cat([value, value])
        for name, value in call.items()
        if value.ndim and not (name == "position_ids" and value.ndim > 2)
    }


def _is_by_row(name: str, value: Tensor, rows: int) -> bool:
    by_token = name in ("input_ids", "position_ids") or (_is_by_token(name) and not name.startswith("pixel"))
    return len(value) == rows and (by_token or value.ndim > 4)


def first_rows(call: Mapping[str, Tensor], rows: int, number: int) -> dict[str, Tensor]:
    """Return a call of ``rows`` rows with the first ``number`` of them."""
    return {name: value[:number] if value.ndim and len(value) == rows else value for name, value in call.items()}


def _unclear(media: list[str], why: str) -> AdapterError:
    return AdapterError(
        f"Which row of the batch each entry of {', '.join(media)} belongs to is not known: {why}.",
        hint="Give all rows as many images of one size, or run the adapters one after the other: "
        "with model.using(name): model(...). Adapters of the text part alone may be mixed.",
    )


def call_of(
    model: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors in a call of ``forward`` or ``generate``, by name."""
    main = _main_input(model)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    if isinstance(call.get("inputs"), Tensor) and main not in call and "inputs" not in names:
        call[main] = call.pop("inputs")
    return {name: value for name, value in call.items() if isinstance(value, Tensor) and name in names}


def rows_of(model: nn.Module, call: Mapping[str, Tensor]) -> int | None:
    """Return the number of rows of a call; ``None`` for a call without tensors of rows."""
    value = next(
        (call[n] for n in (_main_input(model), "input_ids", "inputs_embeds") if n in call),
        next(iter(call.values()), None),
    )
    return None if value is None or not value.ndim else len(value)


def _main_input(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))
