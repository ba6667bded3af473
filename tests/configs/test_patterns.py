"""A config's regular expressions: what ``re`` makes of them, and no longer than a moment."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import veneer
from tests.models import build
from tests.random_adapters import edit_config, saved, saved_base
from veneer.configs import patterns
from veneer.configs.methods.osf import OSFConfig
from veneer.configs.methods.waveft import WaveFTConfig

FORMS = (patterns.WHOLE, patterns.PART, patterns.ENDING, patterns.BLOCK)
NAMES = ("model.layers.0.q_proj", "a", "ab", "b.a", "a1", "", "a{e}", "a.b-1", "[a", "x[:alpha:]", "a{", "A", "a\n")
# What expressions are made of, with what ``re`` and ``regex`` read differently.
PIECES = [
    *"ab.01|*+?^$()[]{} #&~-",
    *("(?:", "(?=a)", "(?!a)", "(?<=a)", "(?i)", "(?x)", "(?i:A)", "(?>a)", "(?P<x>a)", "(?P=x)", r"\1"),
    *("{2}", "{1,}", "{,2}", "{,}", "{e}", "{e<=1}", "{1,2", ".*", "+?", "*+"),
    *("[ab]", "[^a]", "[]a]", "[[:alpha:]]", "[a-q]", "[{]", "&&", "--", "||", "~~"),
    *(r"\.", r"\d", r"\w", r"\b", r"\[", r"\{", r"\N{DIGIT ONE}", r"\Z", r"\A", r"\s", r"\x61"),
]
# None of these ends on a name of a few dozen letters, with ``re`` or without a limit.
ENDLESS = ["(.|.)" * 30 + "[!?]", "(?:.*?){25}[!?]"]


def by_re(pattern: str, form: patterns.Form, name: str) -> Any:
    return getattr(re.compile(form.around.format(pattern)), form.method)(name)


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.sampled_from(FORMS))
def test_an_expression_means_what_it_means_to_re(pattern: str, form: patterns.Form) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re remarks on sets within sets
        try:
            re.compile(pattern)
            expected = [by_re(pattern, form, name) for name in NAMES]
        except re.error:
            if not re.fullmatch(r"[\w.-]*", pattern):
                with pytest.raises(veneer.ConfigError, match="no regular expression"):
                    patterns.check("target_modules", pattern, form)
            return
        patterns.check("target_modules", pattern, form)
        found = [patterns.match(pattern, form, name) for name in NAMES]
    group = "block" if form is patterns.BLOCK else 0
    assert [f and f.group(group) for f in found] == [e and e.group(group) for e in expected]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    saved_base(tmp_path / "base")
    folder = saved(tmp_path / "adapter")
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    return folder


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small allowance. Fail where matching took much longer, by the processor's clock: the machine may be busy."""
    monkeypatch.setattr(patterns, "_LONGEST", 0.02)
    monkeypatch.setattr(patterns, "_ALTOGETHER", 0.2)
    started = time.process_time()
    yield
    assert time.process_time() - started < 5


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("endless", ENDLESS)
def test_one_that_never_ends_is_refused(endless: str, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, target_modules=endless)
    for use in (veneer.load, lambda path: veneer.merge(path, out=tmp_path / "out")):
        with pytest.raises(veneer.ConfigError, match=r"target_modules: .* takes too long") as caught:
            use(adapter)
        assert str(adapter) in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ENDLESS[0]},
        {"rank_pattern": {ENDLESS[0]: 2}},
        {"alpha_pattern": {ENDLESS[0]: 2}},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS[1]},
        {"layers_to_transform": [0], "layers_pattern": ["x", ENDLESS[1]]},
    ],
    ids=["exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "layers_pattern, listed"],
)
def test_every_option_is_limited_and_named(options: dict[str, Any]) -> None:
    config = veneer.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    with pytest.raises(veneer.ConfigError, match=f"{list(options)[-1]}: .* takes too long"):
        veneer.get_peft_model(build("llama"), config)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("feedforward_modules", lambda: veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=ENDLESS[0])),
        ("rank_pattern", lambda: OSFConfig(target_modules=["q_proj"], rank_pattern={ENDLESS[0]: 2})),
        ("n_frequency_pattern", lambda: WaveFTConfig(target_modules=["q_proj"], n_frequency_pattern={ENDLESS[0]: 2})),
    ],
)
def test_options_of_other_methods_are_limited_too(option: str, config: Any) -> None:
    with pytest.raises(veneer.ConfigError, match=f"{option}: .* takes too long"):
        veneer.get_peft_model(build("llama"), config())


@pytest.mark.usefixtures("quickly")
def test_many_that_take_long_have_one_allowance() -> None:
    slow = [f"(?:{'.*' * count}[!?])" for count in range(20, 60)] * 100
    with patterns.matching(where="here"), pytest.raises(veneer.ConfigError, match=r"here: .* takes too long"):
        any(patterns.match(pattern, patterns.WHOLE, "x" * 100) for pattern in slow)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "pattern",
    ["(" * 5000, "(?:(?:(?:a*){100}){100}){100}", "a{99999999999}", "(a?b)" * 10_000, "(", "a)|(b", "(?P<block"],
    ids=["brackets", "copies of copies", "too many", "too long", "open", "shut before it is opened", "cut off"],
)
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_one_that_cannot_be_read_is_no_config(option: str, pattern: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    if option == "target_modules":
        options = {}
    value = {pattern: 2} if option == "rank_pattern" else pattern
    with pytest.raises(veneer.ConfigError, match=f"{option}: .* (no regular expression|too long)"):
        veneer.LoraConfig(**{**options, option: value})


def test_flags_count_where_they_can() -> None:
    assert patterns.match("(?i).*Q_PROJ", patterns.WHOLE, "model.q_proj")
    with pytest.raises(veneer.ConfigError, match="rank_pattern"):
        veneer.LoraConfig(rank_pattern={"(?i)Q_PROJ": 2})  # stands in the middle of what is matched
    assert OSFConfig(rank_pattern={"(?i)Q_PROJ": 2})


def test_a_plain_name_stays_with_re(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_bounded", lambda *_: pytest.fail("matched the slow way"))
    for name in ("q_proj", "model.layers.0.q_proj", r"model\.layers\.\d\.x-y"):
        assert patterns.match(name, patterns.ENDING, name.replace("\\.", ".").replace("\\d", "0"))
