"""Recognises adapters that are not read, and points to what their own tool writes instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from veneer.errors import UnsupportedError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from veneer.files.source import Source
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.format import Base, ReadOptions, Step
from veneer.formats.tensor_files import header_of


class UnreadableFormat:
    """A format that is only recognised.

    Attributes:
        way_out: what to do instead of reading it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    way_out: ClassVar[str]

    def recognise(self, source: Source) -> bool:
        """Tell whether a source is of this format."""
        raise NotImplementedError

    def read(self, source: Source, options: ReadOptions) -> Mapping[str, CanonicalAdapter]:
        """Refuse to read."""
        raise UnsupportedError(f"{source.origin} is an adapter of {self.title}, which is not read.", hint=self.way_out)

    def write(self, adapters: Mapping[str, CanonicalAdapter], target: Path, base: Base | None) -> list[Step]:
        """Refuse to write."""
        raise UnsupportedError(f"{self.title} is not written.", hint="Write PEFT's: --to peft")


class TensorrtFormat(UnreadableFormat):
    """The arrays that TensorRT-LLM's converter writes."""

    name = "tensorrt-llm"
    title = "TensorRT-LLM"
    way_out = "Take the PEFT folder that hf_lora_convert made it from; TensorRT-LLM reads that too."

    def recognise(self, source: Source) -> bool:
        return source.file is None and source.has("model.lora_weights.npy")


class MegatronFormat(UnreadableFormat):
    """The adapter in a checkpoint of Megatron-Bridge or NeMo."""

    name = "megatron"
    title = "Megatron-Bridge or NeMo"
    way_out = "Have Megatron-Bridge write a PEFT folder: save_hf_adapter."

    def recognise(self, source: Source) -> bool:
        header = header_of(source, ADAPTER_WEIGHTS, "model.safetensors")
        return header is not None and any(".adapter.linear_in." in key for key in header.tensors)


class GglaFormat(UnreadableFormat):
    """The file of llama.cpp before GGUF held adapters."""

    name = "ggla"
    title = "llama.cpp before August 2024 (ggla)"
    way_out = "Take the PEFT folder that it was made from, and write a GGUF file: --to gguf"

    def recognise(self, source: Source) -> bool:
        if source.file is None:
            return source.has("ggml-adapter-model.bin")
        return source.file.suffix == ".bin"


class SwiftFormat(UnreadableFormat):
    """A method of ms-swift's own."""

    name = "swift"
    title = "a kind of ms-swift's own (swift_type)"
    way_out = "Merge it with ms-swift (swift export --merge_lora true), then: veneer extract MERGED BASE --out ADAPTER"

    def recognise(self, source: Source) -> bool:
        has_config = source.file is None and source.has(ADAPTER_CONFIG)
        return has_config and "swift_type" in source.json(ADAPTER_CONFIG)


UNREADABLE = (TensorrtFormat(), MegatronFormat(), GglaFormat(), SwiftFormat())
