"""The names of the files that a checkpoint consists of."""

from __future__ import annotations

from collections.abc import Mapping

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
MODEL_CONFIG = "config.json"
MODEL_STEM = "model"
# Of a model of diffusers.
DIFFUSERS_STEM = "diffusion_pytorch_model"
PIPELINE_INDEX = "model_index.json"
SAFETENSORS = ".safetensors"
# The ending of a file that another tool keeps an adapter in -> the bytes that such a file begins with.
FOREIGN_FILES: Mapping[str, bytes] = {".gguf": b"GGUF", ".npz": b"PK", ".lora": b"PK", ".bin": b"algg"}
LITGPT_WEIGHTS = "lit_model.pth.lora"
INDEX = ".safetensors.index.json"

# Bytes per value, by the name that a header gives a dtype.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_HEADER = 100_000_000
