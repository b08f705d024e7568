"""The mixers and models on which every law runs: all defaults of the registry, and variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.mixers import MIXERS, Attention, GatedDeltaNet, LinearAttention
from memjax.model import LanguageModel, Model, make_mixer
from memjax.positions import NoPE

WIDTH = 16

CONFIGS = {
    **{kind: config() for kind, (config, _) in MIXERS.items()},
    "attention-window": Attention(window=6),
    "attention-grouped-short-cache": Attention(kv_heads=2, context=9),
    "attention-nope": Attention(position=NoPE(), window=11),
    "attention-self-only": Attention(window=1),
    "linear-none": LinearAttention(decay="none", chunk=8),
    "linear-vector": LinearAttention(decay="vector", heads=2, chunk=16, value_size=6),
    "delta-no-conv-negative": GatedDeltaNet(conv=None, negative_eigenvalues=True, chunk=8),
}


def mixer_of(name):
    """A mixer with every parameter moved off its initial value, so that no gate is trivial."""
    mixer = make_mixer(CONFIGS[name], WIDTH, rngs=nnx.Rngs(0))
    definition, params = nnx.split(mixer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + (0.3 if leaf.ndim > 1 else 0.1) * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    return nnx.merge(definition, jax.tree.unflatten(tree, moved))


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


def busy_state(mixer, batch=3, seed=7):
    """A state reached by reading something."""
    x_BTD, reset_BT = segment(7, batch, seed)
    return mixer(mixer.init_state(batch), x_BTD, reset_BT)[0]
