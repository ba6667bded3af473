"""Reads the tokenizers that adapters bring, and tells which of them the base can be asked with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import UsageError
from veneer.serving.fetch import digest_in
from veneer.serving.serving_errors import AdapterInvalidError

_VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
_FILES = _VOCABULARIES | {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
# Adapters often bring copies of one tokenizer, which is read once; a large one takes 100 MB.
_MOST_KEPT = 8


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer that an adapter brings.

    Attributes:
        tokenizer: transformers'; ``None`` where the base's is used in its place.
        unfit: why the base's is used in its place.
    """

    tokenizer: Any = None
    unfit: str | None = None


class AdapterTokenizers:
    """Holds the tokenizers that adapters bring, each once; any thread may call it.

    Args:
        tokenizer: transformers' tokenizer of the base; ``None`` where texts are not looked at.
        rows: how many tokens the base has an embedding of.
    """

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self._base, self._rows = tokenizer, rows
        self._kept: OrderedDict[str, OwnTokenizer] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> OwnTokenizer | None:
        """Return the tokenizer in an adapter's folder; ``None`` where it brings none.

        Raises:
            AdapterInvalidError: it cannot be read.
        """
        files = [folder / name for name in sorted(_FILES) if (folder / name).is_file()]
        if self._base is None or not any(file.name in _VOCABULARIES for file in files):
            return None
        key = _digest(folder, tuple((file.name, file.stat().st_mtime_ns) for file in files))
        with self._lock:
            own = self._kept.pop(key, None)
            self._kept[key] = own = own or self._read(folder)
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return own

    def _read(self, folder: Path) -> OwnTokenizer:
        from transformers import AutoTokenizer

        try:
            with transformers_errors_as(UsageError, "The adapter's tokenizer cannot be read", ""):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                tokenizer("")  # sets it to cut off nothing, which is no job for several threads at once
                unfit = self._unfit(tokenizer.get_vocab())
        except UsageError as error:  # which names a folder of this machine
            raise AdapterInvalidError(
                "The adapter's tokenizer cannot be read.",
                hint="Copy its files again, or leave them out to use the base's. Code that comes with one is not run.",
            ) from error
        if unfit is not None:
            return OwnTokenizer(unfit=unfit)
        tokenizer.chat_template = self._base.chat_template  # its own is rendered elsewhere
        return OwnTokenizer(tokenizer)

    def _unfit(self, vocabulary: dict[str, int]) -> str | None:
        """Return why the base cannot be asked with a vocabulary: it needs the base's tokens, and rows for others."""
        known = self._base.get_vocab()
        moved = [token for token, number in known.items() if vocabulary.get(token) != number]
        if moved:
            return f"It lacks the token {min(moved, key=known.get)!r} of the base's, or has another number for it."
        most = max(vocabulary.values(), default=0)
        return f"It has a token {most}, and the base has {self._rows}." if most >= self._rows else None


@lru_cache(maxsize=4096)
def _digest(folder: Path, files: tuple[tuple[str, int], ...]) -> str:
    """Return the digest of an adapter's tokenizer: files and when they were written."""
    return digest_in(folder, tuple(name for name, _ in files))
