"""Re-exports the names that a method in another package imports; all other modules may move.

CONTRIBUTING.md has a whole method as an example.
"""

from __future__ import annotations

from veneer.base_model.sites.attention import AttentionSite
from veneer.base_model.sites.block import BlockSite
from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import Conv1DSite, LinearSite
from veneer.base_model.sites.parameter import ParameterSite, VectorSite
from veneer.base_model.sites.quantized.packed import PackedSite
from veneer.base_model.sites.site import Site
from veneer.base_model.sites.vector import NormSite
from veneer.configs.base import PromptConfig, TargetedConfig, register_config
from veneer.methods import register_method
from veneer.methods.base.abilities import (
    ActsFromTokens,
    AdaptsTwins,
    Allocates,
    Allocation,
    ChangesWhenSaved,
    ChoosesLayers,
    CompletesConfig,
    DerivesTensors,
    Exclusive,
    Penalised,
    RefusesMerge,
    SettledByCheckpoint,
    SharesBetweenLayers,
    SharesTensors,
    SureToChange,
    TiesEmbeddings,
    VariesWithConfig,
)
from veneer.methods.base.method import BaseLayer, Leaf, Method, MethodOnSites, NewLayer, UniformMethod
from veneer.methods.base.prompt_method import EmbeddingTable, PromptEncoder, PromptMethod
from veneer.methods.base.routed_method import RoutedMethod
from veneer.patches.multipliers import BlockDiagonal, Diagonal, FullMatrix, IdentityPlusLowRank, Multiplier
from veneer.patches.operators import Circulant, HadamardLowRank, Kronecker, LinearOperator, Sparse, SparseInTransform
from veneer.patches.patch import Patch, Tokens
from veneer.patches.route import CacheableRoute, Route

__all__ = [
    "ActsFromTokens",
    "AdaptsTwins",
    "Allocates",
    "Allocation",
    "AttentionSite",
    "BaseLayer",
    "BlockDiagonal",
    "BlockSite",
    "CacheableRoute",
    "ChangesWhenSaved",
    "ChoosesLayers",
    "Circulant",
    "CompletesConfig",
    "Conv1DSite",
    "ConvSite",
    "DerivesTensors",
    "Diagonal",
    "EmbeddingSite",
    "EmbeddingTable",
    "Exclusive",
    "FullMatrix",
    "HadamardLowRank",
    "IdentityPlusLowRank",
    "Kronecker",
    "Leaf",
    "LinearOperator",
    "LinearSite",
    "Method",
    "MethodOnSites",
    "Multiplier",
    "NewLayer",
    "NormSite",
    "PackedSite",
    "ParameterSite",
    "Patch",
    "Penalised",
    "PromptConfig",
    "PromptEncoder",
    "PromptMethod",
    "RefusesMerge",
    "Route",
    "RoutedMethod",
    "SettledByCheckpoint",
    "SharesBetweenLayers",
    "SharesTensors",
    "Site",
    "Sparse",
    "SparseInTransform",
    "SureToChange",
    "TargetedConfig",
    "TiesEmbeddings",
    "Tokens",
    "UniformMethod",
    "VariesWithConfig",
    "VectorSite",
    "register_config",
    "register_method",
]
