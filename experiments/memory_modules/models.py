"""The models of this experiment: the same two layers, with and without a memory.

Attention sees 32 tokens; what lies further back only a memory can tell.
"""

from memjax.memory import (
    CompressiveMemory,
    InfiniMemory,
    LandmarkMemory,
    MemorizingMemory,
    RecurrentTokens,
    TransformerXLMemory,
)
from memjax.mixers import Attention
from memjax.model import Model

WIDTH, HEADS, SEGMENT = 96, 3, 32
PLAIN = Attention(heads=HEADS)
LOCAL = Attention(heads=HEADS, window=SEGMENT)

REPLACING = {
    "transformer_xl": TransformerXLMemory(memory=32, segment=SEGMENT),
    "compressive": CompressiveMemory(memory=32, compressed=16, segment=SEGMENT),
    "infini_delta": InfiniMemory(segment=SEGMENT),
    "infini_linear": InfiniMemory(segment=SEGMENT, update="linear"),
    "landmark": LandmarkMemory(block=16, blocks=6, segment=SEGMENT),
}


def model(attention: Attention, memory=None) -> Model:
    return Model(
        d_model=WIDTH,
        pattern=("attention",),
        repeat=2,
        mixers={"attention": attention},
        memory=memory,
        layers="unroll",
    )


def memorizing() -> Model:
    return Model(
        d_model=WIDTH,
        pattern=("attention", "recall"),
        repeat=1,
        mixers={"attention": LOCAL, "recall": PLAIN},
        memory=MemorizingMemory(
            layers=("recall",), memory=512, neighbours=16, segment=SEGMENT, cache=SEGMENT
        ),
        layers="unroll",
    )


MODELS = {
    "none": model(LOCAL),
    **{name: model(PLAIN, memory) for name, memory in REPLACING.items()},
    "memorizing": memorizing(),
    "recurrent_tokens": model(LOCAL, RecurrentTokens(slots=8, segment=SEGMENT)),
}
