"""Write strengths and decays of the memories of a mixture, one class for each inner recurrence.

`gates(x_BTD)` returns (strength_BTH or None, log decay or None), float32, H being all heads of all
memories, those of one memory side by side. A strength makes the recurrence a delta rule; a log
decay is at most 0, [B, T, H] or [B, T, H, K].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.layers import Linear
from memjax.mixers.gla import GATE_TEMPERATURE
from memjax.mixers.retnet import log_decays
from memjax.mixers.streams import split_heads

GATE_RANK = 16


class DeltaGates(nnx.Module):
    """strength = sigmoid(W_b x)."""

    def __init__(self, d_model: int, count: int, heads: int, key_size: int, *, rngs: nnx.Rngs):
        self.beta = Linear(d_model, count * heads, rngs=rngs, axes=("head", "embed"))

    def __call__(self, x_BTD):
        return jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)), None


class GatedDeltaGates(nnx.Module):
    """strength = sigmoid(W_b x);  log decay = -exp(A) softplus(W_a x + dt), A and dt common."""

    def __init__(self, d_model: int, count: int, heads: int, key_size: int, *, rngs: nnx.Rngs):
        self.count = count
        self.beta = Linear(d_model, count * heads, rngs=rngs, axes=("head", "embed"))
        self.decay = Linear(d_model, count * heads, rngs=rngs, axes=("head", "embed"))
        rate_H = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1e-2, 16.0)
        self.log_rate = nnx.Param(jnp.log(rate_H), axes=("head",))
        low, high = math.log(1e-3), math.log(1e-1)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        self.step_bias = nnx.Param(step_H + jnp.log(-jnp.expm1(-step_H)), axes=("head",))

    def __call__(self, x_BTD):
        bias_H = jnp.tile(self.step_bias[...], self.count)
        step_BTH = jax.nn.softplus(self.decay(x_BTD).astype(jnp.float32) + bias_H)
        log_decay_BTH = -jnp.exp(jnp.tile(self.log_rate[...], self.count)) * step_BTH
        return jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)), log_decay_BTH


class NoGates(nnx.Module):
    """Neither: memories add up."""

    def __init__(self, d_model: int, count: int, heads: int, key_size: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD):
        return None, None


class RetentionGates(nnx.Module):
    """The fixed decays of RetNet, the same for every memory."""

    def __init__(self, d_model: int, count: int, heads: int, key_size: int, *, rngs: nnx.Rngs):
        self.count, self.heads = count, heads

    def __call__(self, x_BTD):
        decay_H = jnp.asarray(np.tile(log_decays(self.heads), self.count), jnp.float32)
        return None, jnp.broadcast_to(decay_H, (*x_BTD.shape[:2], len(decay_H)))


class GLAGates(nnx.Module):
    """log decay = log_sigmoid(W_2 W_1 x + b) / 16 by key channel, W_1 common to all memories."""

    def __init__(self, d_model: int, count: int, heads: int, key_size: int, *, rngs: nnx.Rngs):
        self.heads = count * heads
        self.into = Linear(d_model, GATE_RANK, rngs=rngs, axes=("rank", "embed"))
        keys = count * heads * key_size
        self.decay = Linear(GATE_RANK, keys, rngs=rngs, axes=("heads", "rank"), bias=True)

    def __call__(self, x_BTD):
        score_BTF = self.decay(self.into(x_BTD)).astype(jnp.float32)
        return None, split_heads(jax.nn.log_sigmoid(score_BTF) / GATE_TEMPERATURE, self.heads)


GATES = {
    "gated_delta": GatedDeltaGates,
    "delta": DeltaGates,
    "linear": NoGates,
    "retention": RetentionGates,
    "gla": GLAGates,
}
