"""Gradients of the memories that sit in mixers: of loops over segments, and how deep they reach.

Outputs are compared with token loops by `test_mixer_laws.py`; here are loops over whole segments
with `stop_gradient` where the papers have it, differentiated by JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WIDTH, apply, moved, segment
from flax import nnx
from oracles.mixers.compressive import read as read_compressive

from memjax.architecture import Model
from memjax.config import ConfigError
from memjax.memory import (
    CompressiveMemory,
    InfiniMemory,
    LandmarkMemory,
    MemorizingMemory,
    TransformerXLMemory,
)
from memjax.mixers import Attention, Compressive, Infini, Landmark, Memorizing, TransformerXL
from memjax.mixers.base import SequenceMixer
from memjax.mixers.infini import scaled_features
from memjax.positions import ALiBi, NoPE
from memjax.stack import make_mixer

LENGTH = 20
frozen = jax.lax.stop_gradient


def sinusoids(gap, size):
    angle = gap[..., None] / 10_000 ** (2 * jnp.arange(size // 2) / size)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def project(p, name, x_TD, heads):
    return (x_TD @ p[name]["weight"].T).reshape(len(x_TD), heads, -1)


def transformer_xl(p, config, x_TD, memory=()):
    memory = x_TD[:0] if len(memory) == 0 else memory
    out, p_out, p = [], p["out"]["weight"], p["attention"]
    u, v = (p[name].reshape(config.heads, -1) for name in ("content_bias", "distance_bias"))
    for at in range(0, len(x_TD), config.segment):
        h = x_TD[at : at + config.segment]
        context = jnp.concatenate([frozen(memory), h])
        q, k, values = (
            project(p, name, x, config.heads)
            for name, x in (("query", h), ("key", context), ("value", context))
        )
        gap = len(memory) + jnp.arange(len(h))[:, None] - jnp.arange(len(context))
        r = sinusoids(jnp.maximum(gap, 0), WIDTH) @ p["distance"]["weight"].T
        r = r.reshape(*gap.shape, config.heads, -1)
        scores = jnp.einsum("thk,jhk->htj", q + u, k) + jnp.einsum("thk,tjhk->htj", q + v, r)
        weights = jax.nn.softmax(jnp.where(gap >= 0, scores / k.shape[-1] ** 0.5, -1e9), -1)
        out.append(jnp.einsum("htj,jhk->thk", weights, values).reshape(len(h), -1) @ p_out.T)
        memory = jnp.concatenate([memory, h])[-config.memory :]
    return jnp.concatenate(out)


def compressive(p, config, x_TD):
    loop_config = TransformerXL(heads=config.heads, memory=1, segment=config.segment)
    memory = jnp.zeros((config.compressed + config.memory, WIDTH))
    out = []
    for at in range(0, len(x_TD), config.segment):
        h = x_TD[at : at + config.segment]
        out.append(transformer_xl(p, loop_config, h, memory))
        split = config.compressed + config.segment
        old, memory = memory[config.compressed : split], jnp.concatenate([memory, h])
        new = jnp.concatenate([memory[: config.compressed], squeeze(p, config, old)])
        memory = frozen(jnp.concatenate([new[-config.compressed :], memory[split:]]))
    return jnp.concatenate(out)


def squeeze(p, config, old_MD):
    groups = old_MD.reshape(-1, config.rate * WIDTH)
    return groups @ p["compression"]["weight"].T


def rotated(x_THK, place_T):
    """Channels i and i + K/2 as a complex number, turned."""
    first, second = jnp.split(x_THK, 2, -1)
    half = first.shape[-1]
    turn = jnp.exp(1j * place_T[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half))
    z = (first + 1j * second) * turn
    return jnp.concatenate([z.real, z.imag], -1)


def causal(q, k, values, scale):
    """Rotary attention; queries are the last of the keys; heads on axis 1."""
    place = jnp.arange(len(k))
    q, k = rotated(q, place[-len(q) :]), rotated(k, place)
    past = place[-len(q) :, None] >= place
    scores = jnp.where(past, jnp.einsum("thk,jhk->htj", q, k) * scale, -1e9)
    return jnp.einsum("htj,jhk->thk", jax.nn.softmax(scores, -1), values)


def infini(p, config, x_TD):
    q, k, values = (project(p, name, x_TD, config.heads) for name in ("query", "key", "value"))
    size, out, memory, total = k.shape[-1], [], None, None
    gate = jax.nn.sigmoid(config.gate_rate * p["gate"])[:, None]
    phi = lambda x: jax.nn.elu(x) + 1  # noqa: E731

    def read(x, memory, total):
        top = jnp.einsum("thk,hkv->thv", phi(x), memory)
        return top / jnp.einsum("thk,hk->th", phi(x), total)[..., None]

    for at in range(0, len(x_TD), config.segment):
        rows = slice(at, at + config.segment)
        local = causal(q[rows], k[rows], values[rows], size**-0.5)
        recalled = 0.0 if at == 0 else read(q[rows], memory, total)
        out.append((gate * recalled + (1 - gate) * local).reshape(len(local), -1))
        new = values[rows]
        if config.update == "delta" and at > 0:
            new = new - read(k[rows], memory, total)
        written = jnp.einsum("thk,thv->hkv", phi(k[rows]), new), phi(k[rows]).sum(0)
        memory, total = written if at == 0 else (memory + written[0], total + written[1])
    return jnp.concatenate(out) @ p["out"]["weight"].T


def memorizing(p, config, x_TD):
    q, k, values = (project(p, name, x_TD, config.heads) for name in ("query", "key", "value"))
    q, k = (a / jnp.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    q, out = q * (k.shape[-1] ** 0.5 * jnp.abs(p["scale"]))[:, None], []
    gate = jax.nn.sigmoid(p["gate"])[:, None]
    for at in range(0, len(x_TD), config.segment):
        rows, cache = slice(at, at + config.segment), slice(max(0, at - config.cache), at)
        both = [jnp.concatenate([frozen(a[cache]), a[rows]]) for a in (k, values)]
        local, recalled = causal(q[rows], *both, 1.0), 0.0
        if at > 0:
            held = slice(max(0, at - config.memory), at)
            scores = jnp.einsum("thk,jhk->thj", q[rows], frozen(k[held]))
            least = jnp.sort(scores, -1)[..., -min(config.neighbours, scores.shape[-1]), None]
            weights = jax.nn.softmax(jnp.where(scores >= frozen(least), scores, -1e9), -1)
            recalled = jnp.einsum("thj,jhk->thk", weights, frozen(values[held]))
        out.append((gate * recalled + (1 - gate) * local).reshape(len(local), -1))
    return jnp.concatenate(out) @ p["out"]["weight"].T


def landmark(p, config, x_TD):
    """All at once: no block is dropped in so short a text."""
    size, place = config.block + 1, jnp.arange(len(x_TD))
    q, k, values = (project(p, name, x_TD, config.heads) for name in ("query", "key", "value"))
    scores = jnp.einsum("thk,jhk->htj", rotated(q, place), rotated(k, place)) / k.shape[-1] ** 0.5
    block, is_landmark = place // size, place % size == config.block
    own = (block[:, None] == block) & (place[:, None] >= place) & ~is_landmark
    main = jax.nn.softmax(jnp.where(own | (block[:, None] > block) & is_landmark, scores, -1e9), -1)
    by_block = scores.reshape(*scores.shape[:2], -1, size)
    within = jax.nn.softmax(by_block[..., :-1], -1) * main[..., config.block :: size, None]
    within = jnp.pad(within, ((0, 0),) * 3 + ((0, 1),)).reshape(scores.shape)
    y_THK = jnp.einsum("htj,jhk->thk", jnp.where(own, main, within), values)
    return y_THK.reshape(len(x_TD), -1) @ p["out"]["weight"].T


CASES = {
    "landmark": (Landmark(heads=2, block=4, blocks=4), landmark),
    "compressive": (Compressive(heads=2, memory=8, compressed=3, segment=6, rate=2), compressive),
    "transformer_xl": (TransformerXL(heads=2, memory=9, segment=6, chunk=4), transformer_xl),
    "infini": (Infini(heads=2, segment=6), infini),
    "memorizing": (
        Memorizing(heads=2, memory=9, neighbours=4, segment=6, cache=4, chunk=8),
        memorizing,
    ),
}


DEPTH = {"transformer_xl": 0, "memorizing": 0, "compressive": 0, "infini": None, "landmark": None}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_loop_over_segments_and_as_deep(name):
    config, loop = CASES[name]
    mixer: SequenceMixer = moved(make_mixer(config, WIDTH, rngs=nnx.Rngs(0)))
    x, reset = segment(LENGTH, batch=2)
    weight = jax.random.normal(jax.random.key(5), x.shape)
    definition, params = nnx.split(mixer)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def ours(params, x, weight):
        mixer = nnx.merge(definition, nnx.State(params))
        y = mixer(mixer.init_state(2), x, reset)[1]
        return (weight * y).sum(), y

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def theirs(params, x):
        y = jnp.stack([loop(params, config, x_TD) for x_TD in x])
        return (weight * y).sum(), y

    params = nnx.to_pure_dict(params)
    (_, got), got_grads = ours(params, x, weight)
    (_, want), want_grads = theirs(params, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    for grads in (got_grads, want_grads):
        grads[0].pop("compression", None)  # which the outputs do not train: see below
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1, float(jnp.abs(b).max())))
        assert jnp.abs(b).max() > 0

    # Of the outputs of the third segment alone: to its own inputs, and to those before by DEPTH.
    _, (_, for_x) = ours(params, x, weight.at[:, :12].set(0).at[:, 18:].set(0))
    reached = jnp.abs(for_x[:, :18]).reshape(2, 3, -1).max((0, 2))
    assert reached[2] > 0
    assert (reached[:2] > 0).all() if DEPTH[name] is None else (reached[:2] == 0).all()


def test_the_reconstruction_loss_is_that_of_a_token_loop_and_trains_the_compressor_alone():
    config = Compressive(heads=2, memory=5, compressed=3, segment=4, rate=2, reconstruction=0.7)
    mixer = moved(make_mixer(config, WIDTH, rngs=nnx.Rngs(0)))
    x, reset = segment(21, resets=[(0, 6), (1, 0), (2, 13)])
    definition, params = nnx.split(mixer)
    params = nnx.to_pure_dict(params)

    @jax.jit
    @jax.grad
    def trained_by_outputs(params):
        mixer = nnx.merge(definition, nnx.State(params))
        return (mixer(mixer.init_state(3), x, reset)[1] ** 2).sum()

    @jax.jit
    def loss(params, x, start=None):
        mixer = nnx.merge(definition, nnx.State(params))
        start = mixer.init_state(3) if start is None else start
        return mixer.auxiliary_loss(start, x, reset)

    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    error_BT = read_compressive(wide, config, np.asarray(x, np.float64), np.asarray(reset))[1]
    got, (grads, for_x) = jax.value_and_grad(loss, (0, 1))(params, x)
    np.testing.assert_allclose(got, 0.7 * error_BT.mean(), rtol=1e-5)
    assert jnp.abs(for_x).max() == 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert (jnp.abs(leaf).max() > 0) == ("compression" in str(path))
        assert jnp.isfinite(leaf).all()
    assert jnp.abs(trained_by_outputs(params)["compression"]["weight"]).max() == 0


def test_the_reconstruction_loss_of_a_text_does_not_depend_on_its_split():
    config = Compressive(heads=2, memory=4, compressed=3, segment=4, rate=2)
    mixer = moved(make_mixer(config, WIDTH, rngs=nnx.Rngs(0)))
    x, reset = segment(20)
    step = jax.jit(lambda s, x, r: (mixer.auxiliary_loss(s, x, r), mixer(s, x, r)[0]))
    whole, state, parts = step(mixer.init_state(3), x, reset)[0], mixer.init_state(3), []
    for at in (0, 10):
        loss, state = step(state, x[:, at : at + 10], reset[:, at : at + 10])
        parts.append(loss)
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)


def test_what_infini_reads_does_not_depend_on_the_scale_of_features():
    """Where exp would underflow, features are scaled; the ratio that is read stays the same."""
    x = jnp.array([[-1.0, -3.0, -2.0], [0.5, -1.0, 2.0], [-200.0, -201.0, -230.0]])
    plain = np.where(x > 0, x + 1, np.exp(np.asarray(x, np.float64)))
    scaled = np.asarray(scaled_features(x))
    ratio = scaled / scaled.max(-1, keepdims=True)
    np.testing.assert_allclose(ratio, plain / plain.max(-1, keepdims=True), rtol=1e-5)
    assert scaled.max(-1).min() >= 1


def test_gates_of_infini_move_as_fast_as_their_rate_says():
    """beta = gate_rate * b: a step of Adam on b moves beta gate_rate times as far."""
    outputs = []
    for rate, b in ((7.0, 0.1), (1.0, 0.7)):
        config = Infini(heads=2, segment=6, gate_rate=rate)
        mixer = make_mixer(config, WIDTH, rngs=nnx.Rngs(0))
        assert mixer.gate.get_metadata()["axes"] == ("heads",)  # one axis: not decayed
        assert (mixer.gate[...] == 0).all()
        definition, params = nnx.split(mixer)
        params = nnx.to_pure_dict(params)
        params["gate"] = jnp.full(2, b)
        mixer = nnx.merge(definition, nnx.State(params))
        x, reset = segment(20)
        outputs.append(apply(mixer, mixer.init_state(3), x, reset)[1])
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


ATTENTION = dict(pattern=("attention",), repeat=2)


@pytest.mark.parametrize(
    ("memory", "fields", "message"),
    [
        (TransformerXLMemory(), dict(pattern=("lstm",)), "of which the pattern has none"),
        (
            TransformerXLMemory(),
            dict(ATTENTION, position=ALiBi()),
            "mixers.attention.position=ALiBi() has no place in memory transformer_xl",
        ),
        (
            InfiniMemory(),
            dict(ATTENTION, mixers={"attention": Attention(window=8)}),
            "mixers.attention.window=8 has no place in memory infini; leave it out",
        ),
        (
            InfiniMemory(),
            dict(ATTENTION, mixers={"attention": Attention(kv_heads=2)}),
            "mixers.attention.kv_heads=2 has no place in memory infini",
        ),
        (
            CompressiveMemory(),
            dict(ATTENTION, mixers={"attention": Attention(position=NoPE())}),
            "has no place in memory compressive",
        ),
        (LandmarkMemory(), dict(ATTENTION, dropout=0.1), "dropout=0.1 must be 0 with memory landm"),
        (MemorizingMemory(), ATTENTION, "would give all 2 attention layers a memory"),
        (
            MemorizingMemory(layers=("recall",)),
            ATTENTION,
            "must name attention mixers of the pattern; choose from attention",
        ),
    ],
)
def test_a_memory_that_cannot_take_the_place_of_a_mixer_says_why(memory, fields, message):
    with pytest.raises(ConfigError) as error:
        Model(memory=memory, **fields)
    assert message in str(error.value)


def test_a_memory_takes_the_place_of_the_layers_that_it_names():
    mixers = {"recall": Attention(heads=2, position=ALiBi())}
    memory = MemorizingMemory(layers=("recall",), memory=64)
    model = Model(pattern=("attention", "recall"), mixers=mixers, memory=memory)
    assert model.mixer("attention") == Attention()
    assert model.mixer("recall") == Memorizing(heads=2, memory=64, position=ALiBi())
