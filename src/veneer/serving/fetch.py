"""Fetches one adapter into a folder of its own, and checks it; runs in a thread."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from veneer.configs.base import PeftConfig
from veneer.errors import (
    BaseMismatchError,
    IncompleteCheckpointError,
    NonFiniteError,
    PathNotFoundError,
    PickleRefusedError,
    UnsupportedError,
    VeneerError,
)
from veneer.files.atomic_write import flush, writing
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.json_file import read_json
from veneer.files.names import ADAPTER_CONFIG, SAFETENSORS
from veneer.files.source import Source
from veneer.printing import first_line, nbytes
from veneer.serving.registry_types import StoredAdapter
from veneer.serving.serving_errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    ServingError,
    SourceFailedError,
    as_refusal,
)
from veneer.serving.source_files import AdapterSource, FolderSource, KnownSource, SourceFiles

if TYPE_CHECKING:
    from veneer.checkpoints.checkpoint import Checkpoint

FETCHING = ".fetching-"
FACTS = ".stored.json"
_BLOCK = 1 << 20
# Of all files but the weights: a tokenizer of a large vocabulary takes 30 MB.
_MOST_BESIDE_WEIGHTS = 64_000_000


@dataclass(frozen=True)
class FetchRules:
    """The rules that an adapter has to keep to be stored.

    Attributes:
        root: the store's folder.
        adapter_bytes: the most bytes of its files.
        rank: its largest rank; ``None`` for any.
        base_digest: that of the base; ``None`` where it is not known.
        check: refuses what else the adapter's folder holds.
    """

    root: Path
    adapter_bytes: int
    rank: int | None
    base_digest: str | None
    check: Callable[[Path], None]

    @property
    def fingerprint(self) -> str:
        """A text that differs where other adapters are let in."""
        return f"{self.adapter_bytes} {self.rank} {self.base_digest}"


class Fetch:
    """Fetches an adapter once; ``folder`` holds it then, and is removed where anything fails.

    Args:
        rules: for the adapter.
        source: where it is.
        reserve: makes room for so many bytes.
        known: what was fetched from the source before.
        stored: the same in the store; ``None`` where it is not there any more.

    Attributes:
        label: the source without secrets and local paths.
        folder: the adapter's files; ``None`` where the source is as it was, and nothing has to be fetched.
        fingerprint: of the source's files and the rules; ``None`` where a later fetch has to read the files.
    """

    def __init__(
        self,
        rules: FetchRules,
        source: AdapterSource,
        reserve: Callable[[int], None],
        known: KnownSource | None = None,
        stored: StoredAdapter | None = None,
    ) -> None:
        self._rules, self._source, self._reserve, self._known, self._stored = rules, source, reserve, known, stored
        self.label = source.url
        self.folder: Path | None = None
        self.fingerprint: str | None = None

    def run(self, wanted: str | None = None) -> StoredAdapter:
        """Fetch and check the adapter, and make its folder read-only.

        Args:
            wanted: the digest that it must have.

        Raises:
            SourceFailedError: the source fails, or there is no room. AdapterTooLargeError: it is above a limit.
            AdapterInvalidError: it cannot be served.
        """
        try:
            with self._source.opened() as files:
                self.label = files.label
                self.fingerprint = files.fingerprint and f"{files.fingerprint} {self._rules.fingerprint}"
                if self._stored is not None and self._is_unchanged(wanted) and _has_sizes(self._stored, files.sizes):
                    return self._stored
                _check_names(files)
                self._check_sizes(files)
                self._reserve(sum(files.sizes.values()))
                return self._fetched(files, wanted)
        except VeneerError as error:
            self.discard()
            raise self._told(error) from error
        except BaseException:
            self.discard()
            raise

    def _is_unchanged(self, wanted: str | None) -> bool:
        return (
            self._known is not None
            and self._known.fingerprint == self.fingerprint
            and wanted in (None, self._known.digest)
        )

    def discard(self) -> None:
        """Remove what was fetched."""
        if self.folder is not None:
            remove_folder(self.folder)

    def _told(self, error: VeneerError) -> ServingError:
        """Return a refusal that names the source, where the error names the folder here."""
        refusal = as_refusal(error)
        message = refusal.message.replace(str(self.folder or self._rules.root), self.label)
        return type(refusal)(message, hint=refusal.hint, param="source")

    def _fetched(self, files: SourceFiles, wanted: str | None) -> StoredAdapter:
        with writing(self._rules.root):
            self.folder = Path(tempfile.mkdtemp(dir=self._rules.root, prefix=FETCHING))
        # The config first: a rank above the limit is refused before the weights are read.
        names = sorted(files.sizes, key=lambda name: name != ADAPTER_CONFIG)
        hashes: dict[str, bytes] = {}
        rank = 0
        for name in names:
            hashes[name] = self._copied(files, name, self.folder / name)
            if name == ADAPTER_CONFIG:
                rank = self._checked_rank(self.folder / name)
        digest = digest_of(hashes, files.sizes)
        if wanted is not None and digest != wanted:
            raise AdapterInvalidError(
                f"{self.label} has the digest {digest}, and {wanted} is asked for.",
                hint="Its files have changed, or they are not those that you mean.",
            )
        config = self._checked_values(self.folder).config
        self._rules.check(self.folder)
        adapter = StoredAdapter(
            digest,
            self._rules.root / digest.removeprefix("sha256:"),
            sum(files.sizes.values()),
            str(config.peft_type),
            rank,
            config.base_model_name_or_path,
            tuple(sorted(names)),
        )
        self._write_facts(adapter)
        return adapter

    # -- checks --------------------------------------------------------------------------------------------

    def _check_sizes(self, files: SourceFiles) -> None:
        beside = sum(size for name, size in files.sizes.items() if not name.endswith(SAFETENSORS))
        self._check_size(sum(files.sizes.values()), self._rules.adapter_bytes, "")
        self._check_size(beside, _MOST_BESIDE_WEIGHTS, " beside its weights")

    def _check_size(self, size: int, most: int, what: str) -> None:
        if size > most:
            raise AdapterTooLargeError(
                f"{self.label} has {nbytes(size)}{what}, and {nbytes(most)} are allowed.",
                hint="The operator sets the limit with --max-adapter-bytes.",
            )

    def _checked_rank(self, path: Path) -> int:
        config = PeftConfig.from_dict(read_json(path), where=f"{self.label}/{ADAPTER_CONFIG}")
        if config.experts or config.expert_paths:
            raise UnsupportedError(
                f"{self.label} mixes other adapters, which lie elsewhere.", hint="Register those one by one."
            )
        rank = rank_of(config)
        if self._rules.rank is not None and rank > self._rules.rank:
            raise AdapterTooLargeError(
                f"{self.label} has rank {rank}, and {self._rules.rank} is allowed.",
                hint="The operator sets the limit with --max-rank.",
            )
        return rank

    def _checked_values(self, folder: Path) -> Checkpoint:
        """Open the adapter as the library does, and check that its numbers are finite and its base is ours."""
        from veneer.adapters.attach import check_finite
        from veneer.checkpoints.open_checkpoint import open_checkpoint

        checkpoint = open_checkpoint(Source(folder, self.label))
        recorded, base = checkpoint.metadata.get(BASE_DIGEST_KEY), self._rules.base_digest
        if recorded and base and recorded != base and recorded.split(":")[0] == base.split(":")[0]:
            raise BaseMismatchError(
                f"{self.label} was trained on another base: it records {recorded[:19]}, and this one is {base[:19]}.",
                hint="Serve it on the base that it was trained on.",
            )
        try:
            check_finite(checkpoint.read(checkpoint.tensors), self.label)
        except RuntimeError as error:
            raise NonFiniteError(f"{self.label} cannot be checked: {first_line(error)}.") from error
        return checkpoint

    # -- files ---------------------------------------------------------------------------------------------

    def _copied(self, files: SourceFiles, name: str, target: Path) -> bytes:
        """Copy a file, and return the hash of its bytes."""
        hasher = hashlib.sha256()
        with writing(target):
            with target.open("xb") as copy:
                for block in self._blocks(files, name):
                    hasher.update(block)
                    copy.write(block)
            flush(target)
            target.chmod(0o444)
        return hasher.digest()

    def _blocks(self, files: SourceFiles, name: str) -> Iterator[bytes]:
        """Read a file of the source, and check that it has the size that was listed."""
        left = files.sizes[name]
        try:
            with files.open(name) as stream:
                for block in _read(stream):
                    left -= len(block)
                    if left < 0:
                        break
                    yield block
        except VeneerError:
            raise
        except Exception as error:  # of whatever client reads the source
            raise SourceFailedError(f"{self.label}/{name} cannot be read: {first_line(error)}.", hint=_AGAIN) from error
        if left:
            raise SourceFailedError(f"{self.label}/{name} has another size than it was listed with.", hint=_AGAIN)

    def _write_facts(self, adapter: StoredAdapter) -> None:
        assert self.folder is not None
        facts = {key: value for key, value in asdict(adapter).items() if key != "folder"}
        path = self.folder / FACTS
        with writing(path):
            path.write_text(json.dumps(facts), encoding="utf-8")
            flush(path)
            path.chmod(0o444)
            self.folder.chmod(0o555)


def _has_sizes(adapter: StoredAdapter, sizes: Mapping[str, int]) -> bool:
    """Tell whether the files in the store have these sizes; their bytes are read before the adapter is used."""
    try:
        return all((adapter.folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


_AGAIN = "Register it again; its source may have changed meanwhile."


def _check_names(files: SourceFiles) -> None:
    if ADAPTER_CONFIG not in files.sizes:
        raise IncompleteCheckpointError(
            f"{files.label}: there is no {ADAPTER_CONFIG}, so this is no adapter.",
            hint="Give the folder that holds the adapter's config and weights.",
        )
    if files.has_pickle and not any(name.endswith(SAFETENSORS) for name in files.sizes):
        raise PickleRefusedError(
            f"{files.label}: the weights are there only as a pickle, which can run code.",
            hint="If you trust it, convert it with `veneer convert-pickle`, and register the result.",
        )


def _read(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block


def rank_of(config: PeftConfig) -> int:
    """Return the largest rank that a config gives a layer; 0 where its method has none."""
    pattern = getattr(config, "rank_pattern", None) or {}
    ranks = [getattr(config, "r", 0), *pattern.values()]
    return max([rank for rank in ranks if isinstance(rank, int)], default=0)


def digest_of(hashes: Mapping[str, bytes], sizes: Mapping[str, int]) -> str:
    """Return the digest of an adapter: of the names, sizes and SHA-256 hashes of its files."""
    hasher = hashlib.sha256()
    for name in sorted(hashes):
        hasher.update(f"{name}\0{sizes[name]}\0".encode() + hashes[name])
    return f"sha256:{hasher.hexdigest()}"


def adapter_digest(folder: Path) -> str:
    """Compute the digest that the adapter in a folder has once it is stored.

    Raises:
        VeneerError: there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise PathNotFoundError(f"{folder} is no folder.", hint="Give the folder of an adapter.")
    with FolderSource(folder.resolve(), links=True).opened() as files:
        _check_names(replace(files, label=str(folder)))
        return digest_in(folder, tuple(files.sizes))


def digest_in(folder: Path, names: tuple[str, ...]) -> str:
    """Compute the digest of the adapter in a folder; it is another one where a file is missing."""
    paths = {name: folder / name for name in names if (folder / name).is_file()}
    hashes = {name: _hash(path) for name, path in paths.items()}
    return digest_of(hashes, {name: path.stat().st_size for name, path in paths.items()})


def _hash(path: Path) -> bytes:
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for block in _read(file):
            hasher.update(block)
    return hasher.digest()


def remove_folder(folder: Path) -> None:
    """Remove a folder of the store, read-only as it is; one that is not there is none."""
    if folder.exists():
        folder.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
