"""Options for looking up a path or hub id."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LookupOptions:
    """Options for looking up a path or hub id, and the base that an adapter there names.

    Attributes:
        revision: branch, tag or commit on the hub.
        subfolder: the folder below the path.
        token: for the hub.
        local_files_only: use no network.
        cache_dir: the hub's cache; huggingface_hub's own when ``None``.
        force_download: ask the hub again for what the cache holds.
        base_revision: the base's revision on the hub; the one that the adapter records when ``None``.
        trust_remote_code: run code that comes with the base.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | None = None
    local_files_only: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    base_revision: str | None = None
    trust_remote_code: bool = False

    def for_base(self, recorded: str | None) -> LookupOptions:
        """Return the options for the base of an adapter that records the revision ``recorded``."""
        return replace(self, revision=self.base_revision or recorded, subfolder=None)


# Looks only on this machine: in folders and in the hub's cache.
OFFLINE = LookupOptions(local_files_only=True)
