"""What the leaves of each method say, and what its abilities need of them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.methods.document import names
from veneer.methods.base.abilities import ChangesWhenSaved, StoresShared
from veneer.methods.base.method import Leaf
from veneer.methods.base.prompt_method import PromptMethod


@pytest.fixture(params=names())
def method(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"veneer.methods.{request.param.lower()}").METHOD


def _leaves(method: Any) -> tuple[Leaf, ...]:
    shared = method.shared if isinstance(method, StoresShared) else ()
    return shared if isinstance(method, PromptMethod) else (*method.leaves, *shared)


def test_whole_numbers_and_what_no_checkpoint_holds_are_never_trained(method: Any) -> None:
    assert not [leaf for leaf in _leaves(method) if leaf.trained and (leaf.integer or not leaf.saved)]


def test_no_two_leaves_of_a_layer_have_one_name(method: Any) -> None:
    if not isinstance(method, PromptMethod):
        assert len(method.by_name) == len(method.leaves)
        assert len({leaf.memory_name for leaf in method.leaves}) == len(method.leaves)


def test_a_method_works_out_again_what_no_checkpoint_holds(method: Any) -> None:
    if any(not leaf.saved for leaf in _leaves(method)):
        assert isinstance(method, ChangesWhenSaved)
        assert type(method).recomputed is not ChangesWhenSaved.recomputed
