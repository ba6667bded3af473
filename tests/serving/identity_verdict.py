"""Judges the answers of a server, by the oracle and by what was done to its adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.serving.identity_client import Answered
from tests.serving.many_adapters import Oracle
from tests.serving.name_history import NameHistory


@dataclass
class Outcome:
    """The outcome of a run.

    Attributes:
        counts: what happened -> how often.
        faults: what should not have happened.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def blame(self, kind: str, fault: str) -> None:
        """Note what should not have happened."""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {fault}")


@dataclass(frozen=True)
class Judge:
    """Tells right answers from wrong ones.

    Attributes:
        oracle: asks ``generate``.
        histories: name -> what was done to it; the base has none.
        load_wait: the seconds after which the server refuses a request whose adapter is not loaded.
    """

    oracle: Oracle
    histories: Mapping[str, NameHistory]
    load_wait: float

    def judge(self, answers: Iterable[Answered], outcome: Outcome) -> None:
        """Count the answers by their kinds."""
        for answer in sorted(answers, key=lambda answer: (answer.label, -answer.asked.tokens)):
            fault = self.fault(answer)
            if fault:
                outcome.blame("wrong" if answer.error is None else "unexplained", f"{fault}; {answer}")
            else:
                outcome.counts[_kind(answer)] += 1

    def fault(self, answer: Answered) -> str:
        """Return why an answer should not be as it is; an empty string where it is right."""
        if answer.error is not None:
            return "" if self._is_explained(answer) else "refused"
        if not answer.status and answer.left:
            return ""
        return self._label_fault(answer) or self._length_fault(answer) or self._text_fault(answer)

    def _is_explained(self, answer: Answered) -> bool:
        """Tell whether what was done to a name explains why a request was refused."""
        asked, history = answer.asked, self.histories.get(answer.asked.name)
        if history is None or answer.error is None:
            return False
        code, time = answer.error.get("code"), (answer.began, answer.ended)
        is_away = history.might_be(None, *time)
        if code == "adapter_removed":
            return is_away
        if code == "model_not_found":
            return is_away or (asked.digest is not None and history.might_lack(asked.digest, *time))
        return code == "adapter_loading" and (is_away or answer.ended - answer.began >= self.load_wait)

    def _label_fault(self, answer: Answered) -> str:
        """Return why the version in the header cannot have answered the request."""
        asked, (name, _, digest) = answer.asked, answer.label.partition("@")
        history = self.histories.get(asked.name)
        if name != asked.name:
            return "another name"
        if history is None:
            return "a version of the base" if digest else ""
        if asked.digest is not None:
            return "" if digest == asked.digest else "another version than the request names"
        return "" if history.might_be(digest, answer.began, answer.headed) else "not a version of that time"

    def _length_fault(self, answer: Answered) -> str:
        """Return why an answer is too long, or ended before its time."""
        length, asked, history = len(answer.tokens), answer.asked, self.histories.get(answer.asked.name)
        if answer.finish == "abort":
            is_part = history is not None and history.might_be_ended(answer.began, answer.ended)
        else:
            is_part = answer.left
        if length > asked.tokens or not (is_part or (length, answer.finish) == (asked.tokens, "length")):
            return f"{length} tokens, ended by {answer.finish}"
        return "" if is_part or answer.generated == length else f"{answer.generated} tokens counted of {length}"

    def _text_fault(self, answer: Answered) -> str:
        """Return what ``generate`` answers instead."""
        tokens = answer.tokens
        expected = self.oracle.answer(answer.question, answer.asked.tokens)
        is_right = tokens == expected[: len(tokens)] or self.oracle.allows(answer.question, tokens)
        return "" if is_right else f"not {expected}"


def _kind(answer: Answered) -> str:
    if answer.error is not None:
        waited = ", after the wait for it" if "still being loaded" in answer.error["message"] else ""
        return f"refused: {answer.error['code']}{waited}"
    if answer.left:
        return "left by their clients" if answer.status else "left before they began"
    return "ended by force" if answer.finish == "abort" else "right"
