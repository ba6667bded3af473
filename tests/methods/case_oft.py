from __future__ import annotations

from tests.methods.case import Case

_LLAMA = {"target_modules": ["q_proj", "down_proj"]}
CASES = [
    Case("llama", "llama", "OFTConfig", {"oft_block_size": 8, **_LLAMA}),
    Case("Cayley", "llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **_LLAMA}),
    Case("constrained", "llama", "OFTConfig", {"r": 4, "oft_block_size": 0, "coft": True, "eps": 3.0, **_LLAMA}),
    Case(
        "one rotation for all blocks",
        "llama",
        "OFTConfig",
        {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 4, **_LLAMA},
    ),
    Case(
        "bert, biases",
        "bert",
        "OFTConfig",
        {"oft_block_size": 7, "num_cayley_neumann_terms": 2, "bias": "oft_only", "target_modules": ["query"]},
    ),
    Case("embedding", "conv", "OFTConfig", {"oft_block_size": 4, "target_modules": ["embed", "point", "first"]}),
    Case(
        "conv",
        "conv",
        "OFTConfig",
        {"oft_block_size": 6, "target_modules": ["conv2"]},
        ours_differs="peft adds the overlaps of the kernel's windows up, even for a rotation by nothing",
    ),
]
