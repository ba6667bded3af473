"""Reads the config that transformers makes of a GGUF file's metadata."""

from __future__ import annotations

from typing import Any

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import BaseModelError
from veneer.files.source import Source
from veneer.packages import GGUF_PACKAGES, require


def gguf_config(source: Source, file: str) -> dict[str, Any]:
    """Return the config that transformers makes of a GGUF file in a base's folder.

    Raises:
        BaseModelError: a package is missing, or transformers cannot read the file.
    """
    require("A base in a GGUF file", *GGUF_PACKAGES, extra="demo", error=BaseModelError)
    import transformers

    what = f"transformers cannot read {source.root / file}"
    auto: Any = transformers.AutoConfig
    with transformers_errors_as(BaseModelError, what, "It needs an architecture that transformers reads from GGUF."):
        return dict(
            auto.from_pretrained(source.root, gguf_file=file, local_files_only=True, trust_remote_code=False).to_dict()
        )
