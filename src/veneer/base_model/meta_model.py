"""Builds a base model without memory, as a class of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.base_model.transformers_errors import ANOTHER_CLASS, transformers_errors_as
from veneer.base_model.transformers_internals import build, without_memory
from veneer.errors import BaseModelError
from veneer.files.base_folder import without_adapter
from veneer.files.source import Source


def meta_model(kind: Any, source: Source, trust_remote_code: bool = False, **changes: Any) -> nn.Module:
    """Build a base as a class of transformers, on the meta device; ``changes`` are keys of its config to set.

    Raises:
        BaseModelError: transformers cannot build it.
    """
    import transformers

    what = f"transformers cannot build {source.origin} as {kind.__name__}"
    with transformers_errors_as(BaseModelError, what, ANOTHER_CLASS), without_adapter(source) as folder:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **changes
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with without_memory():
            model = build(kind, config, trust_remote_code)
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]
