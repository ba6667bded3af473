"""Tokens trained on bases where several modules share one weight, or where a token is padding: beside peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import veneer
from tests.models import LLAMA, gap
from tests.oracle.peer import VISIBLE, scramble
from tests.sharing import BETWEEN, CLASSES, answers, build, states

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
TOKENS = [6, 5]


def made(library: Any, name: str, **options: Any) -> Any:
    config = library.LoraConfig(r=4, target_modules=BETWEEN, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that modules are tied
        return library.get_peft_model(build(name), config)


def rows(model: nn.Module) -> list[Any]:
    """The trained rows of a model, each once."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in n]


@pytest.mark.parametrize("name", CLASSES)
def test_whatever_shares_the_embedding_has_its_trained_rows(name: str, tmp_path: Path) -> None:
    other = scramble(made(peft, name, trainable_token_indices=TOKENS))
    other.save_pretrained(tmp_path / "peft")
    expected = answers(name, other)
    assert gap(expected, answers(name, build(name))) > VISIBLE
    build(name).save_pretrained(tmp_path / "base")
    here = veneer.PeftModel.from_pretrained(build(name), tmp_path / "peft")
    assert gap(answers(name, here), expected) < CLOSE
    assert not here.load_report.warnings
    merged = here.merge_and_unload()
    assert gap(answers(name, merged), expected) < CLOSE
    merged.save_pretrained(tmp_path / "saved")
    veneer.merge(tmp_path / "peft", tmp_path / "base", out=tmp_path / "disk")
    for folder in ("saved", "disk"):
        again = type(build(name)).from_pretrained(tmp_path / folder).eval()
        assert gap(answers(name, again), expected) < CLOSE
        assert again.config.tie_word_embeddings


@pytest.mark.parametrize("name", CLASSES)
def test_the_rows_get_the_gradients_of_all_that_has_them(name: str) -> None:
    gradients: list[Tensor] = []
    for library in (peft, veneer):
        model = made(library, name, trainable_token_indices=TOKENS).eval()
        (states(name, model) ** 2).mean().backward()
        gradients += [trained.grad for trained in rows(model)]
    expected, mine = gradients
    assert gap(mine, expected) < CLOSE
    assert bool(expected.any(dim=1).all())


# Named one by one: with other tokens, without the embedding that leads, by full names and by endings.
NAMED: dict[str, dict[str, list[int]]] = {
    "not the leading one": {"embed_tokens": TOKENS},
    "an end alone": {"lm_head": TOKENS},
    "alike": {"shared": TOKENS, "lm_head": TOKENS},
    "by endings": {"shared": TOKENS, "embed_tokens": TOKENS},
    "apart": {"shared": TOKENS, "lm_head": [7]},
    "all apart": {"shared": TOKENS, "embed_tokens": [8, 9, 5], "lm_head": [7]},
}


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("name", ["t5", "bart", "marian", "switch"])
def test_tokens_of_single_modules_are_theirs_merged_too(name: str, case: str, tmp_path: Path) -> None:
    other = scramble(made(peft, name, trainable_token_indices=NAMED[case]))
    other.save_pretrained(tmp_path / "peft")
    expected = answers(name, other)
    build(name).save_pretrained(tmp_path / "base")
    here = veneer.PeftModel.from_pretrained(build(name), tmp_path / "peft")
    assert gap(answers(name, here), expected) < CLOSE
    assert len(rows(made(veneer, name, trainable_token_indices=NAMED[case]))) == len(rows(other))
    here.merge_and_unload().save_pretrained(tmp_path / "saved")
    veneer.merge(tmp_path / "peft", tmp_path / "base", out=tmp_path / "disk")
    for folder in ("saved", "disk"):
        again = type(build(name)).from_pretrained(tmp_path / folder).eval()
        assert gap(answers(name, again), expected) < CLOSE


@pytest.mark.parametrize("targets", [None, ["embed_tokens"]])  # peft fails where both are named
@pytest.mark.parametrize("name", ["t5", "bart", "t5 encoder"])
def test_the_method_of_its_own_follows_too(name: str, targets: list[str] | None, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that modules are tied
        other = scramble(peft.get_peft_model(build(name), config))
    other.save_pretrained(tmp_path)
    here = veneer.PeftModel.from_pretrained(build(name), tmp_path)
    assert gap(answers(name, here), answers(name, other)) < CLOSE
    here.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # keys of the config that peft does not know
        back = peft.PeftModel.from_pretrained(build(name), tmp_path / "again").eval()
    assert gap(answers(name, back), answers(name, other)) < CLOSE


def test_tokens_that_are_to_stay_alike_are_the_same() -> None:
    config = veneer.LoraConfig(trainable_token_indices=NAMED["apart"], ensure_weight_tying=True, target_modules=["q"])
    with pytest.raises(veneer.ConfigError, match=r"shared and lm_head share a weight, and other tokens"):
        veneer.get_peft_model(build("t5"), config)


# -- padding ---------------------------------------------------------------------------------------------------------


def llama(padding: int | None, tied: bool) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "pad_token_id": padding, "tie_word_embeddings": tied}))


IDS = torch.tensor([[5, 6, 7, 5, 40, 6]])
CONFIGS = {
    "lora": lambda library: library.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "own": lambda library: library.TrainableTokensConfig(token_indices=TOKENS),
}


@pytest.mark.parametrize("tied", [False, True])
# None, among the places of the trained rows, beyond them, and trained itself.
@pytest.mark.parametrize("padding", [None, 0, 1, 50, 5])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_padding_token_takes_no_gradient_from_another(kind: str, padding: int | None, tied: bool) -> None:
    gradients: list[Tensor] = []
    for library in (peft, veneer):
        model = library.get_peft_model(llama(padding, tied), CONFIGS[kind](library)).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients += [trained.grad for trained in rows(model)]
    expected, mine = gradients
    assert gap(mine, expected) < CLOSE
    assert bool(expected.any(dim=1).all()) is (padding != 5 or tied)


class Table(nn.Module):
    """A look-up as torch has it, every option of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(20, 8, generator=generator), freeze=False, **options)
        self.last = nn.Linear(8, 3, bias=False)
        self.last.weight.data.copy_(torch.randn(3, 8, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.last(self.table(ids))
        return found


def over_table(library: Any, kind: str, options: dict[str, Any]) -> Any:
    tokens = library.TrainableTokensConfig(target_modules=["table"], token_indices=TOKENS)
    lora = library.LoraConfig(target_modules=["table"], r=4)
    model = library.get_peft_model(Table(**options, padding_idx=1), tokens if kind == "rows" else lora)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        generator = torch.Generator().manual_seed(len(parameter))
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trained_once(model: Any) -> tuple[Tensor, list[Tensor]]:
    """What the model gives, and the gradients."""
    found = model(IDS % 20)
    (found**2).sum().backward()
    return found.detach(), [p.grad for p in sorted(model.parameters(), key=len) if p.requires_grad]


@pytest.mark.parametrize("kind", ["rows", "lora"])
@pytest.mark.parametrize("options", [{"max_norm": 1.5}, {"scale_grad_by_freq": True}, {"sparse": True}, {}], ids=repr)
def test_the_other_options_of_a_look_up_hold_too(options: dict[str, Any], kind: str) -> None:
    found, mine = trained_once(over_table(veneer, kind, options))
    # peft itself cannot train here with sparse gradients. A LoRA's sum is looked up as its merged weight is; peft
    # limits the norms of A's columns instead, and divides A's gradients alone.
    plain = {} if "sparse" in options else options
    if kind == "rows" or not plain:
        expected, theirs = trained_once(over_table(peft, kind, plain))
        assert gap(found, expected) < CLOSE
        assert all(gap(one, other) < CLOSE for one, other in zip(mine, theirs, strict=True))
    assert gap(over_table(veneer, kind, options).merge_and_unload()(IDS % 20).detach(), found) < CLOSE
