"""Loads the tokenizer that belongs to a model."""

from __future__ import annotations

import contextlib
from typing import Any

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import CorruptFileError, IncompleteCheckpointError, SourceError
from veneer.files.lookup_options import OFFLINE
from veneer.files.resolve import resolve
from veneer.keywords import takes
from veneer.peft_model.peft_model import PeftModel

# The hint where transformers cannot make a tokenizer.
_TOKENIZER = (
    "Copy its files again, or remove them from the adapter's folder to use the base's. Code that comes with one is "
    "not run."
)


@takes()
def load_tokenizer(model: PeftModel, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a loaded model: the adapter's own if it brings one, else the base's.

    Args:
        model: the loaded model.
        trust_remote_code: run code that comes with the base's tokenizer; an adapter's is never run.

    Raises:
        SourceError: neither has one, it is damaged, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    report = model.load_report
    base = getattr(model, "name_or_path", "")
    places = [*(a.origin for a in (report.adapters if report else ())), base]
    places = [place for place in dict.fromkeys([*places, report.path if report else ""]) if place]
    for place in places:
        source = None
        with contextlib.suppress(SourceError):
            source = resolve(place, OFFLINE)
        if source is not None and (source.has("tokenizer.json") or source.has("tokenizer_config.json")):
            trusted = trust_remote_code and place == base
            with transformers_errors_as(
                CorruptFileError, f"{place}: transformers cannot read the tokenizer there", _TOKENIZER
            ):
                return AutoTokenizer.from_pretrained(source.root, local_files_only=True, trust_remote_code=trusted)
    raise IncompleteCheckpointError(
        f"No tokenizer in {' or '.join(places)}.",
        hint="Save one there with its save_pretrained(...).",
    )
