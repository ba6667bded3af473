"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861, section 3.1).

    X' = [P * (U_t V_t); X]        P: (tokens, dim), U_t: (tokens, r), V_t: (r, dim) of the row's task t

A call names the task of each row: ``model(..., task_ids=tensor)``. For an encoder-decoder the encoder's input gets
them, as in prompt tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.configs.methods.multitask_prompt_tuning import FROM_SOURCE, MultitaskPromptTuningConfig
from veneer.errors import AdapterError, ConfigError
from veneer.files.names import ADAPTER_PICKLE
from veneer.files.paths import is_file
from veneer.files.resolve import resolve
from veneer.methods.base.method import Leaf
from veneer.methods.base.prompt_method import PROMPT, PromptEncoder, PromptMethod
from veneer.methods.prompt_tuning import start
from veneer.packages import stands_in_for_peft

COLS = "prefix_task_cols"
ROWS = "prefix_task_rows"
# The deviation of a new factor's values.
SPREAD = 0.02


class TaskTable(PromptEncoder):
    """Holds a shared table and each task's factors; parameters are named as in peft."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        shared = values[PROMPT]
        self.embedding = nn.Embedding.from_pretrained(shared, freeze=not shared.requires_grad)
        self.prefix_task_cols = nn.Parameter(values[COLS], requires_grad=values[COLS].requires_grad)
        self.prefix_task_rows = nn.Parameter(values[ROWS], requires_grad=values[ROWS].requires_grad)

    def forward(self, tasks: Tensor | None) -> Tensor:
        if tasks is None:
            raise AdapterError(
                "A multitask prompt is active, and the call says nothing of tasks: task_ids cannot be None.",
                hint="Give each row's: model(..., task_ids=torch.tensor([0, ...])).",
            )
        count = self.prefix_task_cols.shape[0]
        if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
            raise AdapterError(
                f"task_ids={tasks.tolist()} names a task that is not there.", hint=f"There are {count}, from 0."
            )
        tasks = tasks.to(self.prefix_task_cols.device)
        tokens: Tensor = self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])
        return tokens

    def tensors(self) -> dict[str, Tensor]:
        return {COLS: self.prefix_task_cols, ROWS: self.prefix_task_rows, PROMPT: self.embedding.weight}


class MultitaskPromptTuning(PromptMethod[MultitaskPromptTuningConfig]):
    """Makes prompts of which each task has its own."""

    shared = (Leaf(COLS), Leaf(ROWS), Leaf(PROMPT))

    def shared_shapes(
        self, config: MultitaskPromptTuningConfig, sites: Sequence[Site]
    ) -> Mapping[str, tuple[int, ...]]:
        tokens, dim = self.size(config)
        tasks, rank = config.num_tasks, config.num_ranks
        return {COLS: (tasks, tokens, rank), ROWS: (tasks, rank, dim), PROMPT: (tokens, dim)}

    def new(
        self, config: MultitaskPromptTuningConfig, words: nn.Module, generator: torch.Generator | None
    ) -> PromptEncoder:
        shapes = self.shared_shapes(config, [])
        values = {leaf: SPREAD * torch.randn(shapes[leaf], generator=generator) for leaf in (COLS, ROWS)}
        if config.prompt_tuning_init in FROM_SOURCE:
            values.update(_from_source(config))
        else:
            values[PROMPT] = start(config, self.size(config), words, generator)
        for leaf, shape in shapes.items():
            if tuple(values[leaf].shape) != shape:
                raise ConfigError(
                    f"{config.prompt_tuning_init_state_dict_path}: {leaf} is {tuple(values[leaf].shape)}, and this "
                    f"config wants {shape}.",
                    hint="Give num_virtual_tokens and num_ranks as the source has them, and num_tasks=1.",
                )
        return TaskTable({leaf: value.requires_grad_() for leaf, value in values.items()})

    def restored(self, config: MultitaskPromptTuningConfig, tensors: Mapping[str, nn.Parameter]) -> PromptEncoder:
        return TaskTable(tensors)


METHOD = MultitaskPromptTuning()


def _from_source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """Return what a checkpoint of source tasks gives to a new prompt, float32 (section 3.2)."""
    path = str(config.prompt_tuning_init_state_dict_path)
    source = {key: tensor.float() for key, tensor in _tensors_of(path).items()}
    missing = {COLS, ROWS, PROMPT} - source.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}.", hint="Name a multitask prompt's checkpoint.")
    if config.prompt_tuning_init == "ONLY_SOURCE_SHARED":
        return {PROMPT: source[PROMPT]}
    if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
        return {PROMPT: source[PROMPT], **{leaf: source[leaf].mean(0, keepdim=True) for leaf in (COLS, ROWS)}}
    task = config.prompt_tuning_init_task or 0
    return {PROMPT: source[PROMPT], **{leaf: source[leaf][task : task + 1] for leaf in (COLS, ROWS)}}


def _tensors_of(path: str) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or where Veneer stands in for peft, which reads it, their pickle."""
    from safetensors.torch import load_file

    from veneer.files.convert_pickle import read_pickle

    if stands_in_for_peft() and Path(path).suffix == Path(ADAPTER_PICKLE).suffix and is_file(Path(path)):
        return read_pickle(Path(path))
    file = resolve(path, what="adapter").file
    if file is None:
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path={path!r} is no safetensors file.",
            hint="Name the source tasks' adapter_model.safetensors.",
        )
    return load_file(file)
