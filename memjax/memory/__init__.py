"""Memory modules that attach to any backbone, by kind: `MEMORIES[kind] = (Config, Module)`.

`memjax.memory.base` says where they attach. To add one: a file here, an oracle in `tests/oracles/`,
and a line below.
"""

from typing import Any

from flax import nnx

from memjax.memory.armt import ARMT, ARMTModule
from memjax.memory.base import (
    LayerMemory,
    LayerModule,
    LayerPart,
    MemoryConfig,
    SegmentMemory,
    SegmentModule,
)
from memjax.memory.compressive import CompressiveMemory
from memjax.memory.infini import InfiniMemory
from memjax.memory.landmark import LandmarkMemory, LandmarkModule
from memjax.memory.lm2 import LM2, LM2Module
from memjax.memory.memorizing import MemorizingMemory
from memjax.memory.memory_plus import MemoryPlus, MemoryPlusModule
from memjax.memory.persistent import Persistent
from memjax.memory.product_keys import ProductKeys, ProductKeysModule
from memjax.memory.recurrent_tokens import RecurrentTokens, RecurrentTokensModule
from memjax.memory.transformer_xl import TransformerXLMemory

MEMORIES: dict[str, tuple[type[MemoryConfig], type[nnx.Module] | None]] = {
    "recurrent_tokens": (RecurrentTokens, RecurrentTokensModule),
    "compressive": (CompressiveMemory, None),
    "landmark": (LandmarkMemory, LandmarkModule),
    "infini": (InfiniMemory, None),
    "memorizing": (MemorizingMemory, None),
    "transformer_xl": (TransformerXLMemory, None),
    "persistent": (Persistent, None),
    "product_keys": (ProductKeys, ProductKeysModule),
    "memory_plus": (MemoryPlus, MemoryPlusModule),
    "lm2": (LM2, LM2Module),
    "armt": (ARMT, ARMTModule),
}
"""The module is None for a memory that takes the place of mixers: it is in `MIXERS`."""


def layer_class(config: LayerMemory) -> type[LayerModule]:
    """The module of a block; called as `cls(config, d_model, rngs=rngs)`."""
    module: Any = MEMORIES[config.kind][1]
    return module


def make_layer_part(config: SegmentMemory, d_model: int, *, rngs: nnx.Rngs) -> LayerPart | None:
    """The part in a block of the module of a model, if it has one."""
    module: Any = MEMORIES[config.kind][1]
    return module.layer_part(config, d_model, rngs=rngs)


def make_segment_module(config: SegmentMemory, d_model: int, *, rngs: nnx.Rngs) -> SegmentModule:
    """The module of a model."""
    module: Any = MEMORIES[config.kind][1]
    return module(config, d_model, rngs=rngs)


__all__ = [
    "ARMT",
    "LM2",
    "MEMORIES",
    "CompressiveMemory",
    "InfiniMemory",
    "LandmarkMemory",
    "MemorizingMemory",
    "MemoryConfig",
    "MemoryPlus",
    "Persistent",
    "ProductKeys",
    "RecurrentTokens",
    "TransformerXLMemory",
    "layer_class",
    "make_layer_part",
    "make_segment_module",
]
