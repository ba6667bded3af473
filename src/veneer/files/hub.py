"""Finds the files of a hub id in the cache, or fetches them; the network is used only where it may be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import PathNotFoundError, SourceError
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import SAFETENSORS
from veneer.files.paths import is_folder, nearest_path
from veneer.files.source import Source


def is_offline() -> bool:
    """Tell whether the environment forbids the network."""
    on = {"1", "true", "yes", "on"}
    return any(os.environ.get(name, "").lower() in on for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def from_hub(repo: str, lookup: LookupOptions, what: str, patterns: Sequence[str]) -> Source:
    """Find a hub repository's files at a revision, in the cache or on the hub; arguments as in ``resolve``."""
    revision, subfolder = lookup.revision, lookup.subfolder
    prefix = f"{Source(Path(), repo).path(subfolder).as_posix()}/" if subfolder else ""
    # With a folder ``owner`` here, ``owner/name`` is a path with a slip in it: the hub is not asked.
    slip = "/" in repo and is_folder(Path(repo).parent)
    request: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [prefix + pattern for pattern in patterns],
        "cache_dir": lookup.cache_dir,
    }
    folder = _cached(repo, request)
    is_whole = folder is not None and _is_complete(Path(folder) / prefix, patterns)
    if (lookup.force_download or not is_whole) and not (lookup.local_files_only or is_offline() or slip):
        folder = _fetch(repo, lookup, what, request, folder)
    if folder is None:
        raise _not_cached(repo, revision, what, slip)
    root = Path(folder) / prefix
    if not is_folder(root):
        raise PathNotFoundError(f"{repo} has no subfolder {subfolder!r}.", hint="Check its spelling.")
    return Source(root, repo + (f"/{subfolder}" if subfolder else ""), revision=revision, commit=Path(folder).name)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return where the cache has a repository, without huggingface_hub, whose import takes long; it may be nowhere."""
    commit = revision or "main"
    if Path(commit).is_absolute() or ".." in Path(commit).parts:  # of a config that leads elsewhere
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder = cache / f"models--{repo.replace('/', '--')}"
    with contextlib.suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if is_folder(snapshot) else None


def _cached(repo: str, request: dict[str, Any]) -> str | None:
    """Return the folder of a repository in the cache; ``None`` when it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(repo, local_files_only=True, **request))
    except LocalEntryNotFoundError:
        return None


def _fetch(repo: str, lookup: LookupOptions, what: str, request: dict[str, Any], cached: str | None) -> str | None:
    """Fetch a repository from the hub and return its folder; where the hub fails, the ``cached`` one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return str(snapshot_download(repo, token=lookup.token, force_download=lookup.force_download, **request))
    except GatedRepoError as error:
        raise SourceError(
            f"The {what} {repo} is gated on the hub.", hint="Accept its terms there, then pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise PathNotFoundError(
            f"The {what} {repo!r} is neither a local path nor a public repository on the hub.",
            hint="Check the spelling; for a private one pass token=.",
        ) from error
    except (OSError, ValueError) as error:
        # Code that needs more files than the cache has raises its own error.
        if cached is None:
            raise _unreachable(repo, what, error) from error
        return cached


def _is_complete(folder: Path, patterns: Sequence[str]) -> bool:
    """Tell whether the cache's copy has all files; one that was fetched for its configs alone has no weights."""
    weights = any(pattern.endswith(SAFETENSORS) for pattern in patterns)
    return folder.is_dir() and any(folder.glob(f"*{SAFETENSORS}" if weights else "*.json"))


def _not_cached(repo: str, revision: str | None, what: str, slip: bool) -> PathNotFoundError:
    if slip:
        return PathNotFoundError(
            f"The {what} {repo!r} does not exist, and the hub's cache holds no repository of that name.",
            hint=f"{nearest_path(Path(repo))} If the hub's is meant: hf download {repo}",
        )
    return PathNotFoundError(
        f"The {what} {repo!r}{f' at {revision!r}' if revision else ''} is neither a local path nor in the hub's "
        "cache, and the network is switched off.",
        hint="Download it first, or give a local path.",
    )


def _unreachable(repo: str, what: str, error: Exception) -> SourceError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = reason.removeprefix("Got: ").rstrip(".")
    return PathNotFoundError(
        f"The {what} {repo!r} is neither a local path nor in the hub's cache, and the hub did not answer: {reason}.",
        hint="Check the spelling of the path, or the network.",
    )
