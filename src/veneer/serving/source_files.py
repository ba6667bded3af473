"""Lists and opens the files of an adapter in a folder, on the hub, or where fsspec reaches."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from veneer.errors import SourceError
from veneer.files.hub import from_hub, is_offline
from veneer.files.lookup_options import LookupOptions
from veneer.files.paths import nearest_path
from veneer.printing import first_line
from veneer.serving.serving_errors import SourceFailedError

# The files of an adapter that are fetched: its config and weights, a tokenizer and a chat template of its own.
_WANTED = re.compile(
    r"adapter_config\.json|adapter_model[\w.-]*\.safetensors(\.index\.json)?|chat_template\.(jinja|json)"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer\.model",
    re.ASCII,
)
_PICKLE = re.compile(r"adapter_model\.(bin|pt|pth)")
_HUB_TIMEOUT = 10.0
# A file system's times are this coarse at most, in seconds: two changes within may look like one.
_SETTLED = 2.0


@dataclass(frozen=True)
class KnownSource:
    """Tells what was fetched from a source: the fingerprint that its files had, and the adapter's digest."""

    fingerprint: str
    digest: str


@dataclass(frozen=True)
class SourceFiles:
    """Holds the files of an adapter in its source, which stay open as long as the block of ``opened`` runs.

    Attributes:
        label: the source without secrets and local paths.
        sizes: name -> bytes, of those that are fetched.
        open: opens one of them for reading.
        has_pickle: the weights are there as a pickle.
        fingerprint: changes whenever a file does; ``None`` where that is not certain.
    """

    label: str
    sizes: Mapping[str, int]
    open: Callable[[str], BinaryIO]
    has_pickle: bool
    fingerprint: str | None = None


class AdapterSource(Protocol):
    """A place that adapters are fetched from."""

    @property
    def url(self) -> str:
        """The address that the globs of allowed sources are compared with."""

    def opened(self) -> Any:
        """Give the files, in a ``with`` block.

        Raises:
            SourceFailedError: they cannot be had.
        """


@dataclass(frozen=True)
class FolderSource:
    """A folder on this machine.

    Attributes:
        path: the folder, with all links on the way to it followed.
        links: whether its files may be links.
    """

    path: Path
    links: bool

    @property
    def url(self) -> str:
        """``file://`` and the path."""
        return f"file://{self.path}"

    @contextmanager
    def opened(self) -> Iterator[SourceFiles]:
        """Open the folder once, so that it does not matter what its path leads to later."""
        label = f"file://.../{self.path.name}"
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise _unreadable(label, error) from error
        try:
            yield self._files(label, folder)
        finally:
            os.close(folder)

    def _files(self, label: str, folder: int) -> SourceFiles:
        def open_file(name: str) -> BinaryIO:
            flags = os.O_RDONLY | os.O_NONBLOCK | (0 if self.links else os.O_NOFOLLOW)
            return os.fdopen(os.open(name, flags, dir_fd=folder), "rb")

        try:
            names = os.listdir(folder)
            facts = {name: self._facts(label, folder, name) for name in sorted(filter(_WANTED.fullmatch, names))}
        except OSError as error:
            raise _unreadable(label, error) from error
        sizes = {name: fact.st_size for name, fact in facts.items()}
        return SourceFiles(label, sizes, open_file, any(map(_PICKLE.fullmatch, names)), _fingerprint(facts))

    def _facts(self, label: str, folder: int, name: str) -> os.stat_result:
        facts = os.stat(name, dir_fd=folder, follow_symlinks=self.links)
        if not stat.S_ISREG(facts.st_mode):
            raise SourceFailedError(
                f"{label}/{name} is a link, or no regular file.", hint="Copy the adapter's files there.", param="source"
            )
        return facts


def _fingerprint(facts: Mapping[str, os.stat_result]) -> str | None:
    """Return a digest of what the system tells of files; ``None`` where one may change again at the same moment."""
    if any(time.time() - fact.st_mtime < _SETTLED for fact in facts.values()):
        return None
    values = [(n, f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for n, f in facts.items()]
    return hashlib.sha256(repr(values).encode()).hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A repository on the hub, at the commit that its revision means when it is opened."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | None = None
    # A folder of that name was looked for here before.
    may_be_folder: bool = field(default=False, compare=False)

    @property
    def url(self) -> str:
        """``hf://`` and the repository's id."""
        return f"hf://{self.repo}"

    @contextmanager
    def opened(self) -> Iterator[SourceFiles]:
        """List the files of the repository; where the hub cannot be reached, those in its cache."""
        files = None if is_offline() else self._listed()
        if files is not None:
            yield files
            return
        with self._cached() as cached:
            yield cached

    @property
    def _label(self) -> str:
        return self.url + (f"#{self.subfolder}" if self.subfolder else "")

    @property
    def _as_folder(self) -> tuple[str, str]:
        """The words of an error that a folder of this name is not there, and which is like it; empty for a hub id."""
        if not self.may_be_folder:
            return "", ""
        return f"There is no folder {self.repo!r}. ", f"{nearest_path(Path(self.repo))} "

    def _listed(self) -> SourceFiles | None:
        from huggingface_hub import HfApi, hf_hub_download

        try:
            info = HfApi(token=self.token).model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=_HUB_TIMEOUT
            )
        except Exception as error:  # of the hub, of the network, of the client of either
            with suppress(SourceFailedError), self._cached():
                return None
            local, near = self._as_folder
            raise SourceFailedError(
                f"{local}The hub gives no {self._label}: {first_line(error).rstrip('.')}.",
                hint=f"{near}Check its name, and that the server has a token for it where it is private.",
                param="source",
            ) from error
        prefix = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

        def open_file(name: str) -> BinaryIO:
            return Path(hf_hub_download(self.repo, prefix + name, revision=info.sha, token=self.token)).open("rb")

        inner = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
        return _selected(f"{self._label}@{info.sha}", inner, open_file)

    @contextmanager
    def _cached(self) -> Iterator[SourceFiles]:
        lookup = LookupOptions(revision=self.revision, subfolder=self.subfolder, local_files_only=True)
        try:
            source = from_hub(self.repo, lookup, "adapter", ("*.json", "*.safetensors"))
        except SourceError as error:
            hint = f"{self._as_folder[1]}{error.hint or ''}"
            raise SourceFailedError(error.message, hint=hint, param="source") from error
        with FolderSource(source.root.resolve(), links=True).opened() as files:
            yield replace(files, label=f"{self._label}@{source.commit}")


@dataclass(frozen=True)
class RemoteSource:
    """A folder in an object store, or wherever else fsspec reaches."""

    url: str

    @contextmanager
    def opened(self) -> Iterator[SourceFiles]:
        """List the files of the folder."""
        import fsspec

        with self._failures():
            system, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            entries = system.ls(root, detail=True)
        sizes = {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"] or 0)
            for entry in entries
            if entry["type"] == "file"
        }

        def open_file(name: str) -> BinaryIO:
            with self._failures():
                file: BinaryIO = system.open(f"{root}/{name}", "rb")
                return file

        yield _selected(self.url, sizes, open_file)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise SourceFailedError(
                f"{self.url} cannot be read: {first_line(error)}.", hint="Install it where the server runs."
            ) from error
        except Exception as error:  # of the store's client, whichever it is
            raise SourceFailedError(
                f"{self.url} cannot be read: {first_line(error).rstrip('.')}.", param="source"
            ) from error


def _selected(label: str, sizes: Mapping[str, int], open_file: Callable[[str], BinaryIO]) -> SourceFiles:
    wanted = {name: sizes[name] for name in sorted(filter(_WANTED.fullmatch, sizes))}
    return SourceFiles(label, wanted, open_file, any(map(_PICKLE.fullmatch, sizes)))


def _unreadable(label: str, error: OSError) -> SourceFailedError:
    return SourceFailedError(f"The source {label} cannot be read: {error.strerror or error}.", param="source")
