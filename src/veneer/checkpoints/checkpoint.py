"""Holds an adapter on disk: reads its tensors where they lie, and writes it whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.configs.base import PeftConfig
from veneer.files.atomic_write import atomic_write, flush, writing
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_STEM, ADAPTER_WEIGHTS, INDEX
from veneer.files.safetensors_header import Header, TensorInfo
from veneer.files.source import Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Holds an adapter's config and header; its tensors are read on demand.

    Attributes:
        origin: the path or id that it was opened by.
        config: its config.
        tensors: key -> dtype and shape, in the file's order.
        metadata: the safetensors header's own.
        notes: changes that were made to it since.
        source: its files; ``None`` when its tensors are in memory.
    """

    origin: str
    config: PeftConfig
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _headers: tuple[Header, ...] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    source: Source | None = field(default=None, kw_only=True, repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they lie in the file, each in its dtype; floating-point numbers of 8 bits become float32."""
        from veneer.files.mapped_tensors import read_mapped

        names = set(keys)
        parts = (read_mapped(header, names) for header in self._headers)
        return {key: _widened(tensor) for part in parts for key, tensor in part.items()}


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype that torch computes with, which those of 8 bits are not."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


@dataclass(frozen=True)
class InMemoryCheckpoint(Checkpoint):
    """Holds an adapter whose tensors are in memory, laid out as a checkpoint."""

    held: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors as they are in memory."""
        return {key: self.held[key] for key in keys}


def in_memory_checkpoint(config: PeftConfig, tensors: Mapping[str, Tensor], origin: str) -> InMemoryCheckpoint:
    """Make a checkpoint of tensors in memory (key -> tensor); errors name ``origin`` as the place they come from."""
    info = {
        key: TensorInfo(key, str(t.dtype).removeprefix("torch."), tuple(t.shape), 0, t.nbytes)
        for key, t in tensors.items()
    }
    return InMemoryCheckpoint(origin, config, info, {}, (), tensors)


@dataclass(frozen=True)
class Draft:
    """Holds an adapter that is to be written.

    Attributes:
        folder: made if it is missing; files of the same names are replaced.
        config: written as it is, with ``inference_mode`` on.
        tensors: checkpoint key -> tensor; written in its own dtype.
        metadata: strings for the safetensors header, beside ``format``.
        as_pickle: write the tensors as a pickle, which has no header, instead of safetensors.
    """

    folder: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    as_pickle: bool = False

    @property
    def weights(self) -> Path:
        """The file that the tensors are written to."""
        return self.folder / (ADAPTER_PICKLE if self.as_pickle else ADAPTER_WEIGHTS)

    def remove_others(self) -> None:
        """Remove the files that hold an older adapter's tensors in another format."""
        for name in (ADAPTER_WEIGHTS, ADAPTER_STEM + INDEX, ADAPTER_PICKLE):
            path = self.folder / name
            if path != self.weights:
                with writing(path):
                    path.unlink(missing_ok=True)


def write_checkpoint(
    folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write an adapter folder: see :class:`Draft` and :func:`replacing`."""
    with replacing([Draft(folder, config, tensors, metadata)]):
        pass


@contextmanager
def replacing(drafts: Sequence[Draft]) -> Iterator[None]:
    """Write every file beside the old one, let the block run, and then put them in the old ones' places.

    The old configs are removed first and the new ones come last, so that a folder with parts of two adapters has no
    config. A failure before that, in the block too, leaves the old adapters as they were.
    """
    with ExitStack() as stack:  # the last to enter is the first to take its place
        for draft in drafts:
            stack.enter_context(atomic_write(draft.folder / ADAPTER_CONFIG)).write_text(
                draft.config.to_json(inference_mode=True), encoding="utf-8"
            )
        for draft in drafts:
            weights = stack.enter_context(atomic_write(draft.weights))
            _save_tensors(draft, weights)
            flush(weights)
        yield
        for draft in drafts:
            with writing(draft.folder / ADAPTER_CONFIG):
                (draft.folder / ADAPTER_CONFIG).unlink(missing_ok=True)
            draft.remove_others()


def _save_tensors(draft: Draft, path: Path) -> None:
    from safetensors.torch import save_file
    from torch import save

    tensors = apart(draft.tensors)
    if draft.as_pickle:
        save({key: tensor.clone() for key, tensor in tensors.items()}, path)  # of a view all its memory would be saved
        return
    save_file(tensors, path, metadata={"format": "pt", **draft.metadata})


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, each in memory of its own, as the format wants one that has two keys."""
    separate: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        value = tensor.detach().contiguous().cpu()
        separate[key] = value.clone() if value.numel() and value.data_ptr() in places else value
        places.add(value.data_ptr())
    return separate
