"""The private names of other libraries that Veneer stands on are there, and are used in few files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import veneer

SOURCE = Path(veneer.__file__).parent
OWNER = "base_model/transformers_internals.py"
# Module -> the names in it that the file named last uses.
NAMES = [
    ("transformers.core_model_loading", "apply_renamings", OWNER),
    ("transformers.core_model_loading", "dot_natural_key", OWNER),
    ("transformers.core_model_loading", "rename_source_key", OWNER),
    ("transformers.core_model_loading", "WeightConverter", OWNER),
    ("transformers.core_model_loading", "WeightRenaming", OWNER),
    ("transformers.conversion_mapping", "get_model_conversion_mapping", OWNER),
    ("transformers.initialization", "no_init_weights", OWNER),
    ("transformers.dynamic_module_utils", "TIME_OUT_REMOTE_CODE", OWNER),
    ("transformers", "AutoModelForCausalLM._model_mapping._model_mapping", OWNER),
    ("transformers", "PreTrainedModel._from_config", OWNER),
    ("transformers", "ContinuousBatchingManager._run_generation_loop", OWNER),
    ("transformers.quantizers.base", "HfQuantizer.remove_quantization_config", OWNER),
    ("transformers.pytorch_utils", "Conv1D", "base_model/sites/linear.py"),
    ("torch", "Tensor._version", "patches/fused.py"),
    ("torch", "Tensor._make_wrapper_subclass", "layers/read_weight.py"),
    ("torch", "_C._current_graph_task_id", "patches/selection.py"),
    ("torch.utils._pytree", "tree_map_only", "layers/read_weight.py"),
    ("torch.nn", "Module._apply", "layers/adapted_layer.py"),
    ("torch.nn", "Module._load_from_state_dict", "layers/parameter_holder.py"),
    ("torch.nn", "Module._replicate_for_data_parallel", "layers/adapted_layer.py"),
    ("torch.nn.modules.batchnorm", "_BatchNorm", "base_model/sites/bias_only.py"),
    ("torch.nn.modules.instancenorm", "_InstanceNorm", "base_model/sites/bias_only.py"),
]


@pytest.mark.parametrize(("module", "name", "file"), NAMES, ids=[f"{module}.{name}" for module, name, _ in NAMES])
def test_the_name_is_there(module: str, name: str, file: str) -> None:
    mend = f"{module} {transformers.__version__, torch.__version__} has no {name}: mend src/veneer/{file}"
    assert name.rpartition(".")[2] in (SOURCE / file).read_text(encoding="utf-8"), f"not used in {file} any more"
    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), mend
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
    texts = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert [file for file, text in texts.items() if private.search(text)] == [OWNER]
