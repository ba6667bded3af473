"""Trains an adapter on two processes, saves it and loads it again: ``two_processes.py (ddp | fsdp2) BASE OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if "VENEER_AS_PEFT" in os.environ:
    import veneer.as_peft  # noqa: F401

import peft
import torch
import torch.distributed as dist

from tests.clients.world import base_model, last_logits, lora, started, weight_sum

ROWS = torch.tensor([[5, 9, 13, 17], [6, 8, 30, 41]])


def steps(model: Any, backward: Any, rank: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        row = ROWS[rank : rank + 1]
        loss = model(input_ids=row, labels=row).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ddp(base: Path, out: Path) -> list[float]:
    """Train under accelerate, whose state is saved and loaded too."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = started(peft.get_peft_model(base_model(base), lora()))
    model = accelerator.prepare(model)
    losses = steps(model, accelerator.backward, accelerator.process_index)
    own = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    own.save_pretrained(out, is_main_process=accelerator.is_main_process, state_dict=state)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(out / "state"))
    accelerator.wait_for_everyone()
    before = weight_sum(own)
    accelerator.load_state(str(out / "state"))
    assert weight_sum(own) == before
    return losses


def fsdp2(base: Path, out: Path) -> list[float]:
    """Train sharded by torch's ``fully_shard``, and save the whole tensors."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = started(peft.get_peft_model(base_model(base), lora()))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = steps(model, lambda loss: loss.backward(), dist.get_rank())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # as scripts do, and Trainer
        model.save_pretrained(out, state_dict=state)
    return losses


def main(kind: str, base: Path, out: Path) -> None:
    losses = {"ddp": ddp, "fsdp2": fsdp2}[kind](base, out)
    dist.barrier()
    if dist.get_rank() == 0:
        files = sorted(path.name for path in out.iterdir())
        loaded = peft.PeftModel.from_pretrained(base_model(base), out)
        figures = {"losses": losses, "files": files, "weights": weight_sum(loaded), "loaded": last_logits(loaded, base)}
        (out / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
