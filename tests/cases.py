"""The mixers and models on which every law runs: all defaults of the registry, and variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.mixers import (
    GLA,
    HGRN2,
    MIXERS,
    MLSTM,
    RGLRU,
    TTTMLP,
    AllAttention,
    Attention,
    Based,
    Compressive,
    DeltaNet,
    GatedDeltaNet,
    Infini,
    Landmark,
    LinearAttention,
    Mamba,
    Mamba2,
    Memorizing,
    Miras,
    MoM,
    RetNet,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TransformerXL,
    TTTLinear,
)
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import LanguageModel, Model
from memjax.positions import ALiBi, NoPE
from memjax.stack import make_mixer
from pallas_kernels.neural_memory import ElasticNet, LinearMap, Nesterov, Robust

WIDTH = 16

# One config of every kind, small where its default would hide block or chunk borders.
KINDS = {kind: config() for kind, (config, _) in MIXERS.items()} | {
    # With fewer keys, the output of a head may cancel to less than bfloat16 can tell from nothing.
    "gla": GLA(heads=2),
    "all_attention": AllAttention(slots=5, heads=2, context=23),
    "deltanet": DeltaNet(heads=2),
    "based": Based(heads=2, key_size=3, chunk=8),
    "mamba": Mamba(states=3, expand=1, rank=2, chunk=8),
    "mamba2": Mamba2(head_size=8, state_size=6, groups=2, chunk=8),
    "rg_lru": RGLRU(width=18, heads=3, chunk=8),
    "mlstm": MLSTM(heads=2, expand=1, block=2, conv=2, chunk=8),
    "hgrn2": HGRN2(expand=4, chunk=8),
    "ttt_linear": TTTLinear(update_every=7, heads=2),
    "ttt_mlp": TTTMLP(update_every=3, expansion=2, heads=2),
    "titans_lmm": TitansLMM(memory=DeepMemory(heads=2, update_every=8)),
    "titans_mac": TitansMAC(segment=8, memory=DeepMemory(heads=2, update_every=4)),
    "titans_mag": TitansMAG(window=6, memory=DeepMemory(heads=2, update_every=7, momentum=False)),
    "titans_mal": TitansMAL(window=5, memory=DeepMemory(heads=2, update_every=4, conv=2)),
    "compressive": Compressive(heads=2, memory=5, compressed=3, segment=4, rate=2),
    "landmark": Landmark(heads=2, block=3, blocks=4, retrieve=2),
    "infini": Infini(heads=2, segment=4, gate_rate=2.0),
    "memorizing": Memorizing(
        heads=2, memory=9, neighbours=3, segment=6, cache=4, chunk=12, position=ALiBi()
    ),
    "transformer_xl": TransformerXL(heads=2, memory=6, segment=8, clamp=9, chunk=12),
}
# Other settings, which meet the laws of splits, oracles and speed settings alone.
VARIANTS = {
    "attention-window": Attention(window=6),
    "attention-grouped-short-cache": Attention(kv_heads=2, context=9),
    "attention-nope": Attention(position=NoPE(), window=11),
    "attention-alibi": Attention(position=ALiBi(), context=12),
    "attention-self-only": Attention(window=1),
    "attention-cap-sinks": Attention(window=7, kv_heads=2, logit_cap=0.5, sinks=True),
    "attention-cap-sinks-alibi": Attention(context=12, position=ALiBi(), logit_cap=2.0, sinks=True),
    "all_attention-window": AllAttention(slots=3, window=6, head_size=3, position=NoPE()),
    "linear-none": LinearAttention(decay="none", chunk=8),
    "linear-vector": LinearAttention(decay="vector", heads=2, chunk=16, value_size=6),
    "delta-no-conv-negative": GatedDeltaNet(conv=None, negative_eigenvalues=True, chunk=8),
    "retnet-nope": RetNet(position=NoPE(), heads=2, chunk=8),
    "deltanet-no-conv": DeltaNet(conv=None, negative_eigenvalues=True, heads=2, key_size=5),
    "mom-delta": MoM(inner="delta", memories=3, top_k=1, shared=False, heads=2, conv=None),
    "mom-linear": MoM(inner="linear", memories=3, top_k=2, heads=2, conv=None, chunk=8),
    "mom-retention": MoM(inner="retention", memories=3, heads=2, value_size=5),
    "mom-gla": MoM(inner="gla", memories=2, top_k=1, heads=2, conv=2, chunk=8),
    "ttt_linear-no-conv": TTTLinear(update_every=4, conv=None),
    "compressive-max": Compressive(
        heads=2, memory=6, compressed=3, segment=6, rate=3, compression="max"
    ),
    "landmark-all": Landmark(heads=2, block=5, blocks=2, position=ALiBi()),
    "infini-linear-alibi": Infini(heads=2, segment=7, update="linear", position=ALiBi()),
    "titans_lmm-deep": TitansLMM(
        memory=DeepMemory(
            heads=2, layers=3, expansion=1, update_every=8, residual_norm=False, conv=None
        )
    ),
    "miras-linear-robust": Miras(
        structure=LinearMap(),
        bias=Robust(),
        retention=ElasticNet(cut=0.05),
        learner=Nesterov(),
        update_every=3,
        heads=2,
        conv=None,
    ),
}
CONFIGS = KINDS | VARIANTS


def mixer_of(name):
    """A mixer with every parameter moved off its initial value, so that no gate is trivial."""
    return moved(make_mixer(CONFIGS[name], WIDTH, rngs=nnx.Rngs(0)))


def moved(module, scale=1.0):
    """The module, with noise on every parameter."""
    definition, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + scale * (0.3 if leaf.ndim > 1 else 0.1) * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    return nnx.merge(definition, jax.tree.unflatten(tree, noisy))


def model_of(layers="scan", remat="none", dtype="float32", **fields):
    config = Model(
        d_model=WIDTH,
        pattern=("attention", "gated_deltanet"),
        repeat=2,
        mixers={"attention": Attention(window=5), "gated_deltanet": GatedDeltaNet(chunk=8)},
    )
    config = dataclasses.replace(config, layers=layers, remat=remat, dtype=dtype, **fields)
    return LanguageModel(config, 31, rngs=nnx.Rngs(0))


def segment(length, batch=3, seed=0, resets=()):
    """Random inputs, and resets at the (lane, token) pairs given."""
    x_BTD = jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))
    reset_BT = np.zeros((batch, length), bool)
    for lane, token in resets:
        reset_BT[lane, token] = True
    return x_BTD, jnp.asarray(reset_BT)


@jax.jit
def apply(mixer, state, x_BTD, reset_BT):
    return mixer(state, x_BTD, reset_BT)


def busy_state(mixer, batch=3, seed=7):
    """A state reached by reading something."""
    x_BTD, reset_BT = segment(5, batch, seed)
    return apply(mixer, mixer.init_state(batch), x_BTD, reset_BT)[0]
