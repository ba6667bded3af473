"""Every public name of peft takes here what it takes there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import nn

from tests.as_peft.process import printed

# What peft's own forward and loading ask for, and what an instance here has from its base.
INTERNAL = {"get_prompt", "get_prompt_embedding_to_save", "set_modules_to_save", "prepare_inputs_for_generation"}
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def names(call: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.kind in BY_NAME and p.name not in ("self", "cls")]


def calls() -> dict[str, Callable[..., Any]]:
    """Every public function of peft, and every public method of its models and configs, that is its own."""
    found: dict[str, Callable[..., Any]] = {}
    for name in peft.__all__:
        value = getattr(peft, name)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value) and name.endswith("Config"):
            found[f"{name}.__init__"] = value.__init__
        elif inspect.isclass(value) and name.startswith(("PeftM", "AutoPeft")):
            for method in set(dir(value)) - {*dir(nn.Module), "push_to_hub"} - INTERNAL:
                if not method.startswith("_") and callable(getattr(value, method)):
                    found[f"{name}.{method}"] = getattr(value, method)
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, list[str]]:
    lines = printed(f"""
        import functools, peft
        from tests.as_peft.test_signatures import names
        for call in {sorted(calls())!r}:
            value = functools.reduce(getattr, call.split("."), peft)
            print(call, *names(value), *getattr(getattr(value, "__func__", value), "keywords", ()))
    """)
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.oracle
def test_there_are_many() -> None:
    assert len(calls()) > 150


@pytest.mark.oracle
@pytest.mark.parametrize("call", sorted(calls()))
def test_its_keywords_are_taken(call: str, ours: dict[str, list[str]]) -> None:
    open_ended = {"config", "revision", "import_allowlist"} if call.startswith("AutoPeft") else set()
    assert {*names(calls()[call])} <= {*ours[call]} | open_ended
