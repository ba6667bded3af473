"""What OSF promises beside the contract: training does not touch the directions that are kept."""

from __future__ import annotations

import torch

import veneer
from tests.models import build, inputs


def test_gradients_are_orthogonal_to_the_kept_directions() -> None:
    config = veneer.OSFConfig(target_modules=["down_proj", "up_proj"], effective_rank=9)
    model = veneer.get_peft_model(build("llama"), config, seed=1)
    model(**inputs("llama")).logits.square().mean().backward()
    for name in ("down_proj", "up_proj"):
        layer = model.adapters.layers[f"model.layers.0.mlp.{name}"]
        u, _, v = torch.linalg.svd(layer.base_weight(), full_matrices=False)
        parts = layer.osf_svd_params["default"]
        for kept, gradient in ((u[:, :9].T, parts.U_low.grad), (v[:9], parts.V_low.grad.T)):
            assert (kept @ gradient).abs().max() < 1e-5 * gradient.abs().max()
