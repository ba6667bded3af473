"""What two processes that share a base do, each check of the two that the tests look at; run by ``spawn``."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests.models import gap, inputs, logits
from tests.random_adapters import WEIGHTS, config, enlarge
from veneer.base_model.sharding import whole
from veneer.errors import AdapterError, MergeError, UnsupportedError

BATCH = inputs("llama")
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]
RATE = 0.5


def plain(root: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root / "base").eval()


def tensor_parallel(root: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(root / "base", distributed_config=DistributedConfig(tp_size=2)).eval()


def fully_sharded(root: Path) -> Any:
    return shard(plain(root))


def shard(model: Any) -> Any:
    """Apply FSDP2 to each block and to the whole."""
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if isinstance(model, veneer.PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer)
    # Else the outermost parameters stay whole after a call without gradients, and an optimizer would be given those.
    fully_shard(base, reshard_after_forward=True)
    return model


def rows(rank: int) -> dict[str, Tensor]:
    """A process's own part of the batch."""
    return {name: tensor[rank : rank + 1] for name, tensor in BATCH.items()}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return value


def step(model: veneer.PeftModel, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loss(model.train(), batch).backward()
    optimizer.step()
    model.eval()


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert gap(a[name], b[name]) < 1e-4, (name, gap(a[name], b[name]))


def new(model: Any, **options: Any) -> veneer.PeftModel:
    own = veneer.get_peft_model(model, config(**{"target_modules": TARGETS, **options}), seed=1).eval()
    enlarge(own, "default")
    return own


def check_saved(model: veneer.PeftModel, folder: Path, expected: dict[str, Tensor], rank: int) -> None:
    """Every process calls; the first alone has written, and everything, when the call returns."""
    model.save_pretrained(folder / f"called by all {rank}" if rank else folder)
    close(load_file(folder / WEIGHTS), expected)
    assert not list(folder.parent.glob("*/called*"))


def check_tensor_parallel(rank: int, root: Path) -> None:
    # Patches of several forms: low-rank, with factors and shifts, and an adapted embedding.
    for options in ({}, {"use_dora": True, "lora_bias": True}, {"target_modules": ["embed_tokens", "o_proj"]}):
        expected, whole = new(plain(root), **options), new(tensor_parallel(root), **options)
        assert gap(logits(whole, BATCH), logits(expected, BATCH)) < 1e-5, options
        names = ["default", "__base__"]
        assert gap(logits(whole, BATCH, adapter_names=names), logits(expected, BATCH, adapter_names=names)) < 1e-5
        with whole.disable_adapter(), expected.disable_adapter():
            assert gap(logits(whole, BATCH), logits(expected, BATCH)) < 1e-5
        for model in (expected, whole):
            step(model, BATCH)
        close(whole.get_adapter_state_dict(), expected.get_adapter_state_dict())
    check_saved(whole, root / "tp", expected.get_adapter_state_dict(), rank)
    refuses(lambda: whole.merge_adapter(), MergeError, "spread over processes")
    refuses(lambda: new(tensor_parallel(root), modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save")
    # Nothing told the processes to draw alike.
    torch.manual_seed(rank)
    fresh = veneer.get_peft_model(tensor_parallel(root), config(target_modules=TARGETS))
    same_everywhere(fresh.get_adapter_state_dict())
    loaded = veneer.PeftModel.from_pretrained(tensor_parallel(root), root / "tp")
    assert gap(logits(loaded, BATCH), logits(whole, BATCH)) < 1e-5


def check_fully_sharded(rank: int, root: Path) -> None:
    for before in (True, False):  # attached before, or after the base is sharded
        for options in ({}, {"use_dora": True}):
            expected = new(plain(root), **options)
            model = shard(new(plain(root), **options)) if before else new(fully_sharded(root), **options)
            own = logits(model, rows(rank))
            assert gap(own, logits(expected, rows(rank))) < 1e-5
            step(expected, BATCH)
            step(model, rows(rank))  # the rows are of one length: the mean of the losses is the loss of all
            folder = root / f"fsdp {before} {len(options)}"
            check_saved(model, folder, expected.get_adapter_state_dict(), rank)
            assert gap(logits(model, rows(rank)), logits(expected, rows(rank))) < 1e-4
    refuses(lambda: model.merge_and_unload(), MergeError, "spread over processes")
    check_saved_from_gathered(model, root / "gathered", rank)
    loaded = veneer.PeftModel.from_pretrained(fully_sharded(root), folder)
    assert gap(logits(loaded, rows(rank)), logits(model, rows(rank))) < 1e-5


def check_gradients(rank: int, root: Path) -> None:
    """Under DDP and FSDP2, with checkpointing: the mean of what each process would learn alone, dropout included."""
    for options in ({}, {"use_dora": True}, {"lora_dropout": 0.3}):
        for wrap in (data_parallel, shard):
            alone, model = (new(plain(root), **options) for _ in range(2))
            expected = {name: mean(gradient) for name, gradient in learned(alone, alone, rank).items()}
            model.activation_checkpointing_enable()
            close({name: whole(gradient) for name, gradient in learned(wrap(model), model, rank).items()}, expected)


def data_parallel(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


def learned(wrapped: Any, model: veneer.PeftModel, rank: int) -> dict[str, Tensor]:
    """The gradients after a pass over this process's rows."""
    torch.manual_seed(rank)
    loss(wrapped.train(), rows(rank)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mean(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total / 2


def check_saved_from_gathered(model: veneer.PeftModel, folder: Path, rank: int) -> None:
    """The first process saves alone what has been gathered before; the other does not even have it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    expected = model.get_adapter_state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        close(load_file(folder / WEIGHTS), expected)
        part = {name: tensor for name, tensor in state.items() if "lm_head" not in name}
        refuses(lambda: model.save_pretrained(folder, state_dict=part), AdapterError, "has not all tensors")
        refuses(lambda: model.save_pretrained(folder, state_dict={}), AdapterError, "has not all tensors")
    else:
        model.save_pretrained(folder / "other", state_dict=state)
        assert not (folder / "other").exists()
    torch.distributed.barrier()


def same_everywhere(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        first = tensor.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(first, tensor), name


def refuses(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


CHECKS = (check_tensor_parallel, check_fully_sharded, check_gradients)


def work(rank: int, root: Path, port: int) -> None:
    """One process: run each check, and leave a file that says how it ended."""
    where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TQDM_DISABLE="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for check in CHECKS:
        try:
            check(rank, root)
            said = ""
        except Exception:
            said = traceback.format_exc()
        (root / f"{check.__name__} {rank}").write_text(said)
        if said:
            os._exit(1)  # the other process may be waiting
    torch.distributed.destroy_process_group()


def spawn(root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(work, (root, port), nprocs=2, start_method="spawn")
