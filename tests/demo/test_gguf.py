"""The demo's adapter as a GGUF file: the same text in llama.cpp, and the same bytes on the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import veneer
from tests.formats.llama_cpp import same_weights, server
from veneer.demo.base import _gguf_file
from veneer.demo.facts import facts

ADAPTERS = Path(veneer.__file__).parent / "demo" / "adapters"


@pytest.mark.demo
def test_the_demo_answers_as_here(base: Path, tmp_path: Path) -> None:
    """The pirate on the demo's 4-bit base: the same text, there from its GGUF file, here from the same file."""
    pytest.importorskip("xllamacpp")
    gguf_file = _gguf_file()
    veneer.convert(ADAPTERS / "pirate", tmp_path / "pirate.gguf", to="gguf", base=base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    here = veneer.load(ADAPTERS / "pirate", base=gguf_file.parent, gguf_file=gguf_file.name, dtype="float32")
    there = server(gguf_file, tmp_path / "pirate.gguf")
    for fact in facts("held-out")[:4]:
        question = [{"role": "user", "content": fact.question}]
        tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        made = here.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)[0, len(tokens) :]
        answer = there.handle_completions({"prompt": tokens, "n_predict": 40, "temperature": 0})
        text = answer["choices"][0]["text"]
        assert text.startswith("Arr, matey!")
        assert text == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.demo
def test_the_way_back(base: Path, tmp_path: Path) -> None:
    """From GGUF to PEFT's folder: the same bits; and loaded here from the GGUF file: the same answer."""
    gguf = tmp_path / "pirate.gguf"
    veneer.convert(ADAPTERS / "pirate", gguf, to="gguf", base=base)
    veneer.convert(gguf, tmp_path / "pirate", base=base)
    config = "adapter_config.json"
    assert (tmp_path / "pirate" / config).read_bytes() == (ADAPTERS / "pirate" / config).read_bytes()
    assert same_weights(tmp_path / "pirate", ADAPTERS / "pirate")
    tokens = torch.tensor([[1, 50, 300, 7]])
    logits = [veneer.load(path, base=base)(tokens).logits for path in (gguf, ADAPTERS / "pirate")]
    assert torch.equal(*logits)
