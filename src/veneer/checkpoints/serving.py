"""Checks by config and headers that a server of LoRA adapters takes an adapter as it is, and means the same by it.

vLLM reads ``r``, ``lora_alpha``, ``target_modules`` and ``use_rslora``, and the factors A and B. Some of the rest it
refuses; the patterns and the options of LoRA's variants it does not read, and answers wrongly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.inspection.facts import Problem
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.lora_start_options import is_moved
from veneer.errors import UsageError
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.resolve import resolve
from veneer.formats.table import NO_LORA, OPTIONS
from veneer.keywords import TOKEN, takes
from veneer.printing import Report

SERVERS = ("vllm",)
# The limits that --max-lora-rank takes; an adapter of a smaller rank is padded.
_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_REQUIRED = ("r", "lora_alpha", "target_modules")
_FACTOR = re.compile(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$")
# Option that vLLM does not read -> what it does.
_UNREAD = {
    "rank_pattern": "gives some layers a rank of their own, and so a scale",
    "alpha_pattern": "gives some layers a scale of their own",
    **OPTIONS,
    "target_parameters": "adapts parameters that are no modules of their own",
}
# Those of them that a plain LoRA cannot mend, those that need a rank for it, and those that are only another spelling.
_NO_LORA = (*NO_LORA, "target_parameters")
_NEED_RANK = ("kasa_config",)
_FOLDED = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class ServingReport(Report):
    """The result of a check for a server.

    Attributes:
        adapter: the adapter.
        server: the server.
        max_lora_rank: the smallest limit of ranks that it may be served under; ``None`` where there is none.
        problems: why it is not taken, or would answer wrongly, each with its mend.
    """

    adapter: str
    server: str
    max_lora_rank: int | None
    problems: tuple[Problem, ...]

    _title = "serving report"

    @property
    def fits(self) -> bool:
        """True where the server takes the adapter as it is."""
        return not self.problems

    def _facts(self) -> list[tuple[str, str]]:
        taken = f"takes it as it is, with --max-lora-rank {self.max_lora_rank} or more"
        return [
            ("adapter", self.adapter),
            (self.server, taken if self.fits else "does not serve it as it is"),
        ]

    def _warnings(self) -> list[str]:
        return [f"{problem.message} {problem.hint}" for problem in self.problems]

    def _border(self) -> str:
        return "green" if self.fits else "red"


@takes(renamed=TOKEN)
def check_serving(
    adapter: str | os.PathLike[str],
    server: str = "vllm",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> ServingReport:
    """Tell whether a server takes an adapter as it is, and what to do where it does not.

    Reads the config and the headers of the weights alone. That the server knows the base, and LoRA on its layers, is
    not checked.

    Args:
        adapter: its folder or hub id.
        server: ``"vllm"``.
        revision: branch, tag or commit on the hub.
        subfolder: where below it to look.
        token: for the hub.
        local_files_only: use no network.

    Raises:
        UsageError: the server is unknown. SourceError, ConfigError: the adapter cannot be read.
    """
    if server not in SERVERS:
        raise UsageError(f"{server!r} is no server that is known.", hint=f"There is: {', '.join(SERVERS)}.")
    source = resolve(adapter, LookupOptions(revision, subfolder, token, local_files_only), what="adapter")
    checkpoint = open_checkpoint(source)
    values = source.json(ADAPTER_CONFIG)
    path = os.fspath(adapter)
    rank = max((info.shape[0] for key, info in checkpoint.tensors.items() if _is_down(key)), default=0)
    limit = next((limit for limit in _LIMITS if limit >= rank > 0), None)
    problems = [*_method_problems(values, path), *_option_problems(values, path)]
    if not problems:
        problems = [*_tensor_problems(checkpoint, path), *_rank_problems(rank, limit, path)]
    return ServingReport(path, server, limit, tuple(problems))


def _is_down(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_embedding_A"))


def _method_problems(values: Mapping[str, Any], path: str) -> list[Problem]:
    method = values.get("peft_type")
    if method == "LORA":
        return []
    return [Problem("method", f"It is of method {method}, and only LoRA is served.", _convert(path, 16))]


def _option_problems(values: Mapping[str, Any], path: str) -> list[Problem]:
    """Find what the config says that is refused, or not read."""
    if values.get("peft_type") != "LORA":
        return []
    missing = [name for name in _REQUIRED if values.get(name) is None]
    problems = [
        Problem("missing", f"{ADAPTER_CONFIG} has no {name}, which is required.", _fold(path)) for name in missing
    ]
    if values.get("modules_to_save"):
        modules = ", ".join(map(str, values["modules_to_save"]))
        problems.append(Problem("modules_to_save", f"It brings modules whole: {modules}.", _merge(path)))
    if values.get("use_dora"):
        problems.append(Problem("dora", "It is a DoRA, which is refused.", _convert(path, 16)))
    if values.get("bias", "none") != "none":
        problems.append(Problem("bias", f"It trains biases (bias {values['bias']!r}), which is refused.", _merge(path)))
    if values.get("lora_bias"):
        problems.append(Problem("lora_bias", "Its factors have a bias (lora_bias), which is refused.", _merge(path)))
    start = values.get("init_lora_weights")
    if is_moved(start):
        text = f"It is for a base without its start, which vLLM does not compute (init_lora_weights {start!r})."
        problems.append(Problem("start", text, _convert(path)))
    for name in (name for name in _UNREAD if values.get(name)):
        problems.append(Problem(name, f"vLLM does not read {name}, which {_UNREAD[name]}.", _mend(name, path)))
    return problems


def _mend(option: str, path: str) -> str:
    if option in _FOLDED:
        return _fold(path)
    return _merge(path) if option in _NO_LORA else _convert(path, 16 if option in _NEED_RANK else None)


def _tensor_problems(checkpoint: Checkpoint, path: str) -> list[Problem]:
    """Find tensors that are no factors of a LoRA, or have keys that only Veneer understands."""
    others = [key for key in checkpoint.tensors if not _FACTOR.search(key)]
    if not others:
        return [Problem("keys", note, _convert(path)) for note in checkpoint.notes]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [Problem("tensors", f"It holds tensors that are no factors of a LoRA: {others[0]}{more}.", _merge(path))]


def _rank_problems(rank: int, limit: int | None, path: str) -> list[Problem]:
    if limit is not None:
        return []
    return [
        Problem(
            "rank",
            f"Its rank is {rank}, and the largest that is served is {_LIMITS[-1]}.",
            _convert(path, _LIMITS[-1]),
        )
    ]


def _fold(path: str) -> str:
    return f"Write the same LoRA as servers read it: veneer convert {path} NEW --to serving."


def _convert(path: str, rank: int | None = None) -> str:
    if rank is None:
        return f"Make a plain LoRA of it: veneer convert {path} NEW --as-lora."
    what = "Make a plain LoRA of it, and see what error that leaves"
    return f"{what}: veneer convert {path} NEW --as-lora --rank {rank}."


def _merge(path: str) -> str:
    return f"Merge it and serve the model: veneer merge {path} --out NEW."
