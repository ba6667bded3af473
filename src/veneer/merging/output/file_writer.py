"""Does several pieces of work at a time, writes their bytes, and hashes finished tensors behind them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from veneer.adapters.merge.worker_threads import one_thread_each
from veneer.merging.base.hashing import ALGORITHM
from veneer.merging.base.weight_files import WeightFiles, read_exactly
from veneer.merging.work.file_layout import OutputFile
from veneer.merging.work.pieces import Piece, Sink
from veneer.merging.work.rounding import RoundingFigures

_BLOCK = 1 << 20


class FileSink:
    """Writes into the output's files, at their final offsets.

    Args:
        folder: where the files are made.
        files: the files' layouts.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self.folder = folder
        self.files = {file.name: file for file in files}
        self.file_of = {name: file for file in files for name in file.tensors}
        self._open: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None

    def make(self, file: OutputFile) -> None:
        """Create a file of its full size, all holes but for its header."""
        descriptor = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._open[file.name] = descriptor
        os.ftruncate(descriptor, file.nbytes)
        _write(descriptor, memoryview(file.header), 0)

    def put(self, name: str, start: int, data: Tensor) -> None:
        """Write bytes of a tensor, unless its file is finished already."""
        file = self.file_of[name]
        if file.name in self._open:
            _write(self._open[file.name], _bytes(data), file.start(name) + start)

    def copy(self, names: Sequence[str], files: WeightFiles, file: str, start: int, count: int) -> None:
        """Copy a range inside the system, or through memory where it cannot."""
        out = self.file_of[names[0]]
        if out.name in self._open:
            _copy_range(files, file, start, self._open[out.name], out.start(names[0]), count)

    def read(self, file: str, start: int, into: Tensor) -> Tensor:
        """Fill a tensor with bytes that were written before."""
        return read_exactly(self._open[file], self.folder / file, start, into)

    def begin_flush(self, file: str) -> None:
        """Begin to flush a file to the disk, so that little is left at the end."""
        if self._flushing is None or self._flushing.done():
            self._flushing = self._pool.submit(os.fsync, self._open[file])

    def finish(self, file: str) -> None:
        """Flush a file to the disk and close it."""
        if self._flushing is not None:
            self._flushing.result()
        descriptor = self._open.pop(file)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the files that are open."""
        self._pool.shutdown(wait=True)
        while self._open:
            os.close(self._open.popitem()[1])


def _bytes(data: Tensor) -> memoryview:
    return data.detach().reshape(-1).view(torch.uint8).numpy().data


def _write(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _copy_range(files: WeightFiles, file: str, start: int, out: int, position: int, count: int) -> None:
    source = files.descriptor(file)
    while count and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, out, min(count, 1 << 30), start, position)
        except OSError:  # another disk, or a file system without it; if it is something else, the write fails too
            break
        if not done:
            break
        start, position, count = start + done, position + done, count - done
    while count:
        block = files.file_bytes(file, start, min(count, _BLOCK))
        _write(out, _bytes(block), position)
        start, position, count = start + len(block), position + len(block), count - len(block)


def run_all(
    pieces: Sequence[Piece], sink: Sink, workers: int | None = None
) -> Iterator[tuple[Piece, list[RoundingFigures]]]:
    """Do every piece, several at a time, and yield each when it and all before it are done.

    When one fails, those that have not begun are dropped and its error is raised.
    """
    with one_thread_each(workers) as pool:
        futures: list[Future[list[RoundingFigures]]] = [pool.submit(piece.run, sink) for piece in pieces]
        try:
            for piece, future in zip(pieces, futures, strict=True):
                yield piece, future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def write_files(
    files: Sequence[OutputFile],
    pieces: Sequence[Piece],
    sink: FileSink,
    finished: Callable[[OutputFile, str, list[RoundingFigures]], None],
    workers: int | None = None,
) -> None:
    """Write files in their order; ``finished`` is called with each one's digest and figures when it is on the disk."""
    for file in files:
        sink.make(file)
    pending = {name for file in files for name in file.tensors}
    todo = [piece for piece in pieces if pending.intersection(piece.outputs)]
    done: dict[str, list[RoundingFigures]] = {}
    results = run_all(todo, sink, workers)
    for file in files:
        digest = blake3(file.header)
        figures: list[RoundingFigures] = []
        for name, info in file.tensors.items():
            while name not in done:
                piece, piece_figures = next(results)
                done.update({output: [] for output in piece.outputs})
                done[piece.outputs[0]] = piece_figures
            figures += done[name]
            _hash(digest, sink, file, info.nbytes, file.start(name))
            sink.begin_flush(file.name)
        sink.finish(file.name)
        finished(file, f"{ALGORITHM}:{digest.hexdigest()}", figures)
    for _ in results:
        pass


def _hash(digest: blake3, sink: FileSink, file: OutputFile, count: int, start: int) -> None:
    block = torch.empty(min(count, _BLOCK), dtype=torch.uint8)
    for position in range(0, count, _BLOCK):
        digest.update(_bytes(sink.read(file.name, start + position, block[: count - position])))
