"""The models of this experiment: the same two layers, with and without a memory.

Attention sees a segment's length of tokens, or its segment; what lies further back only a memory
can tell.
"""

import dataclasses

from memjax.memory import (
    ARMT,
    LM2,
    CompressiveMemory,
    InfiniMemory,
    LandmarkMemory,
    MemorizingMemory,
    MemoryPlus,
    Persistent,
    ProductKeys,
    RecurrentTokens,
    TransformerXLMemory,
)
from memjax.memory.base import LayerMemory, MemoryConfig
from memjax.mixers import Attention, BaseConv, TitansMAC
from memjax.mixers.base import MixerConfig
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model

WIDTH, HEADS = 64, 2


def two_layers(first: MixerConfig, second: MixerConfig, memory: MemoryConfig | None) -> Model:
    mixers = {"first": first, "second": second}
    return Model(d_model=WIDTH, pattern=("first", "second"), repeat=1, mixers=mixers, memory=memory)


def with_convolutions(model: Model) -> Model:
    """A gated short convolution as a layer of its own before either layer.

    So that a value need not find its key, which stands before it, by attention.
    """
    memory, mixers = model.memory, {**model.mixers, "conv": BaseConv()}
    if isinstance(memory, LayerMemory) and memory.at == (1,):
        memory = dataclasses.replace(memory, at=(3,))
    pattern = ("conv", "first", "conv", "second")
    return dataclasses.replace(model, pattern=pattern, mixers=mixers, memory=memory)


def make_models(segment: int) -> dict[str, Model]:
    """By the name of the memory; segments of so many tokens."""
    attending = {  # in place of attention, with a reach of their own
        "transformer_xl": TransformerXLMemory(memory=segment, segment=segment),
        "compressive_conv": CompressiveMemory(memory=segment, compressed=16, segment=segment),
        "compressive_mean": CompressiveMemory(
            memory=segment, compressed=16, segment=segment, compression="mean"
        ),
        "infini_linear": InfiniMemory(segment=segment, update="linear"),
        "infini_delta": InfiniMemory(segment=segment),
        "landmark": LandmarkMemory(block=segment // 2, blocks=6, segment=4 * segment),
        "memorizing": MemorizingMemory(
            layers=("second",), memory=512, neighbours=16, segment=segment, cache=segment
        ),
    }
    around = {  # layers that begin each segment with nothing but what 8 tokens bring
        "recurrent_tokens": RecurrentTokens(slots=8, segment=segment),
        "armt": ARMT(slots=8, segment=segment, memory_size=16),
    }
    beside = {  # attention to the last tokens stays as it is
        "lm2": LM2(at=(1,), slots=16, segment=segment, heads=HEADS),
        "product_keys": ProductKeys(at=(1,), keys=24, heads=2, top_k=8, query_size=32),
        "memory_plus": MemoryPlus(at=(1,), keys=16, heads=2, top_k=8, query_size=32),
        "persistent": Persistent(slots=64),
    }
    plain, local = Attention(heads=HEADS), Attention(heads=HEADS, window=segment)
    within = Attention(heads=HEADS, context=segment + 16)
    deep = DeepMemory(heads=HEADS, update_every=min(16, segment))
    titans = TitansMAC(memory=deep, segment=segment)
    models = {"none": two_layers(local, local, None)}
    for name, memory in attending.items():
        first = local if memory.layers else plain
        models[name] = two_layers(first, plain, memory)
    models |= {name: two_layers(within, within, memory) for name, memory in around.items()}
    models |= {name: two_layers(local, local, memory) for name, memory in beside.items()}
    return models | {"titans_mac": two_layers(titans, titans, None)}
