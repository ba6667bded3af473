"""A holder of parameters makes the containers of a module only when they are asked for."""

from __future__ import annotations

import torch
from torch import nn

from veneer.layers.parameter_holder import ParameterHolder

# The attributes of a fresh module, but for those that a holder sets itself. One that is no empty container has to be
# made by ParameterHolder.
CONTAINERS = {
    *("_backward_hooks", "_backward_pre_hooks", "_buffers", "_forward_hooks", "_forward_hooks_always_called"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_is_full_backward_hook"),
    *("_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_modules", "_non_persistent_buffers_set"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
}


def test_a_module_has_these_containers_and_no_other() -> None:
    fresh = vars(nn.Module())
    assert fresh.keys() - {"training", "_parameters"} == CONTAINERS, "see layers/parameter_holder.py"
    assert not any(fresh[name] for name in CONTAINERS)


def test_a_print_out_tells_shape_and_dtype() -> None:
    holder = ParameterHolder(training=True)
    holder.weight = nn.Parameter(torch.zeros(8, 32))
    assert repr(holder) == "ParameterHolder(weight: [8, 32], torch.float32)"


def test_a_holder_begins_without_them_and_makes_each_as_a_module_has_it() -> None:
    fresh, holder = vars(nn.Module()), ParameterHolder(training=True)
    assert vars(holder).keys() == {"training", "_parameters"}
    for name in CONTAINERS:
        assert getattr(holder, name) == fresh[name]
        assert getattr(holder, name) is getattr(holder, name)


def test_beside_a_weight_a_bias_is_none_as_on_a_linear_layer() -> None:
    holder = ParameterHolder(training=True)
    assert not hasattr(holder, "bias")
    holder.weight = nn.Parameter(torch.zeros(8, 32))
    assert holder.bias is None
    holder.bias = nn.Parameter(torch.zeros(8))
    assert holder.bias.shape == (8,)
    assert [*holder.state_dict()] == ["weight", "bias"]
