"""The private names of other libraries that Veneer stands on are there, and are used in few files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import veneer
from veneer.base_model.sites import offload
from veneer.base_model.sites.offload import HOOKED

SOURCE = Path(veneer.__file__).parent
TEXTS = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"
OWNER = "base_model/transformers_internals.py"
# Modules, and the names in them that the source uses.
NAMES = [
    ("transformers.core_model_loading", "apply_renamings"),
    ("transformers.core_model_loading", "dot_natural_key"),
    ("transformers.core_model_loading", "rename_source_key"),
    ("transformers.core_model_loading", "ConversionOps"),
    ("transformers.core_model_loading", "WeightConverter"),
    ("transformers.core_model_loading", "WeightRenaming"),
    ("transformers.conversion_mapping", "get_model_conversion_mapping"),
    ("transformers.initialization", "no_init_weights"),
    ("transformers.dynamic_module_utils", "TIME_OUT_REMOTE_CODE"),
    ("transformers", "AutoModelForCausalLM._model_mapping._model_mapping"),
    ("transformers", "PreTrainedModel._from_config"),
    ("transformers", "ContinuousBatchingManager._run_generation_loop"),
    ("transformers.quantizers.base", "HfQuantizer.remove_quantization_config"),
    ("transformers.pytorch_utils", "Conv1D"),
    ("torch", "Tensor._version"),
    ("torch", "Tensor._make_wrapper_subclass"),
    ("torch", "_C._current_graph_task_id"),
    ("torch.utils._pytree", "tree_map_only"),
    ("torch.nn", "Module._apply"),
    ("torch.nn", "Module._load_from_state_dict"),
    ("torch.nn", "Module._replicate_for_data_parallel"),
    ("torch.nn.modules.batchnorm", "_BatchNorm"),
    ("torch.nn.modules.instancenorm", "_InstanceNorm"),
]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_the_name_is_there(module: str, name: str) -> None:
    users = [file for file, text in TEXTS.items() if name.rpartition(".")[2] in text]
    assert users, f"nothing uses {name} any more: take it out of this test"
    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module} of {VERSIONS} has no {name}: mend {users}"
        found = getattr(found, part)


def test_modules_have_the_containers_that_are_read() -> None:
    kept = vars(nn.Conv2d(1, 1, 1))
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        assert isinstance(kept[name], dict), f"nn.Module keeps no {name}"
    assert "_reversed_padding_repeated_twice" in kept, "mend src/veneer/base_model/sites/conv.py"


def test_one_file_knows_the_undocumented_parts_of_transformers() -> None:
    private = re.compile(
        r"transformers\.(core_model_loading|conversion_mapping|initialization|dynamic_module_utils|models)\b"
        r"|from transformers import dynamic_module_utils"
        r"|\._(model_mapping|from_config|name_or_path|weight_conversions)\b"
    )
    assert [file for file, text in TEXTS.items() if private.search(text)] == [OWNER]


def test_a_hook_of_accelerate_has_what_offloaded_weights_are_read_by() -> None:
    module = add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook(execution_device="cpu", offload=True))
    missing = [name for name in HOOKED if name not in vars(module)]
    assert not missing, f"accelerate puts no {missing} into a module: mend src/veneer/base_model/sites/offload.py"
    hook = offload.offloading_hook(module)
    assert hook is module._hf_hook
    assert offload.execution_device(module) == torch.device("cpu")
    assert {"weight", "bias"} <= set(hook.weights_map)
