"""The text of an answer, piece by piece, is what the tokenizer makes of all its tokens, up to a stop string."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.peft_model.stop_strings import before_stop
from veneer.serving.answer_text import AnswerText

SPECIAL = "<end>"


def byte_level() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[SPECIAL], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat and the hat, naïve 猫 🙂🙂 stop here STOP"] * 9, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL)


TOKENIZER = byte_level()


class Slow:
    """A tokenizer without a fast backend."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return str(TOKENIZER.decode(tokens, skip_special_tokens=skip_special_tokens))


def pieces(tokens: list[int], stops: tuple[str, ...] = (), tokenizer: Any = TOKENIZER) -> tuple[list[str], bool]:
    answer, told = AnswerText(tokenizer, stops), []
    for token in tokens:
        told.append(answer.add(token))
        if answer.stopped:
            return told, True
    return [*told, answer.rest()], answer.stopped


TEXTS = st.text(alphabet="stop herSTOP,ï猫🙂", max_size=30)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Slow()])
@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(["stop", "st", "op h", "🙂🙂", "ï", "TO"]), max_size=3))
def test_the_pieces_are_the_text_before_a_stop(tokenizer: Any, text: str, stops: list[str]) -> None:
    told, stopped = pieces(TOKENIZER.encode(text), tuple(stops), tokenizer)
    assert "".join(told) == before_stop(text, stops)
    assert stopped == any(stop in text for stop in stops)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
def test_tokens_that_are_no_text_break_nothing(tokens: list[int]) -> None:
    told, _ = pieces(tokens)
    expected = TOKENIZER.decode(tokens, skip_special_tokens=True)
    strip = "\N{REPLACEMENT CHARACTER}"
    assert "".join(told).replace(strip, "") == expected.replace(strip, "")


def test_a_character_comes_when_it_is_complete() -> None:
    told, _ = pieces(TOKENIZER.encode("a€b"))
    assert [piece for piece in told if piece] == ["a", "€", "b"]
    assert pieces(TOKENIZER.encode("€")[:1])[0][-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_no_text() -> None:
    end = TOKENIZER.convert_tokens_to_ids(SPECIAL)
    assert "".join(pieces([*TOKENIZER.encode("hat"), end])[0]) == "hat"


def test_what_may_be_a_stop_is_held_back() -> None:
    answer = AnswerText(TOKENIZER, ("stop",))
    told = [answer.add(token) for token in TOKENIZER.encode("he s")]
    assert "".join(told) == "he "
    assert answer.rest() == "s"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces([1, 2], tokenizer=None) == (["", "", ""], False)
