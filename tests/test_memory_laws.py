"""The laws of the contract, on models with each memory module of the registry.

A model is a mixer of tokens, so these are the laws of `test_mixer_laws.py`, on logits. Modules of
the kind that replaces mixers are mixers of their own and meet the laws there as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WIDTH, apply, moved
from flax import nnx

from memjax.architecture import Model
from memjax.config import ConfigError
from memjax.layers import RMSNorm
from memjax.memory import (
    MEMORIES,
    LandmarkMemory,
    MemorizingMemory,
    RecurrentTokens,
)
from memjax.mixers import LSTM, MIXERS, Attention, GatedDeltaNet
from memjax.model import LANE_AXIS, LanguageModel, logical_axes, split
from memjax.positions import ALiBi

VOCAB = 31
MEMORY_CASES = {
    "recurrent_tokens": (RecurrentTokens(slots=3, segment=8), ("attention", "lstm")),
    "recurrent_tokens-delta": (RecurrentTokens(slots=2, segment=5), ("gated_deltanet",)),
    "memorizing": (
        MemorizingMemory(layers=("recall",), memory=9, neighbours=3, segment=4, cache=3),
        ("attention", "recall"),
    ),
    "landmark": (LandmarkMemory(block=3, blocks=4, segment=6), ("softmax", "lstm")),
}
MIXER_CONFIGS = {
    "attention": Attention(context=32),
    "softmax": Attention(heads=2),
    "recall": Attention(heads=2, position=ALiBi()),
    "gated_deltanet": GatedDeltaNet(chunk=8, heads=2),
    "lstm": LSTM(),
}
RESETS = [(0, 5), (0, 6), (1, 0), (1, 21), (2, 28)]
LENGTH = 29


def model_with(memory, pattern, **fields):
    mixers = {name: MIXER_CONFIGS[name] for name in pattern}
    config = Model(d_model=WIDTH, pattern=pattern, repeat=2, mixers=mixers, memory=memory, **fields)
    return config, moved(LanguageModel(config, VOCAB, rngs=nnx.Rngs(0)), scale=0.1)


def tokens(length=LENGTH, seed=0, resets=RESETS):
    tokens_BT = jax.random.randint(jax.random.key(seed), (3, length), 0, VOCAB)
    reset_BT = np.zeros((3, length), bool)
    for lane, token in resets:
        reset_BT[lane, token] = True
    return tokens_BT, jnp.asarray(reset_BT)


def assert_close(got, want, tolerance=3e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=MEMORY_CASES, scope="module")
def lm(request):
    return model_with(*MEMORY_CASES[request.param])[1]


def busy(lm):
    """A state in the middle of a segment."""
    x, reset = tokens(11, seed=5, resets=[(1, 3)])
    return apply(lm, lm.init_state(3), x, reset)[0]


def test_every_memory_has_a_case():
    """Those that are mixers alone are among the cases of mixers, and one of them is here."""
    cases = {memory.kind for memory, _ in MEMORY_CASES.values()}
    assert cases | set(MIXERS) >= set(MEMORIES)
    assert cases >= {kind for kind, (_, module) in MEMORIES.items() if module is not None}
    assert any(MEMORIES[kind][1] is None for kind in cases)


def test_any_split_of_a_text_equals_the_whole(lm):
    x, reset = tokens()
    start = busy(lm)
    want_state, want = apply(lm, start, x, reset)
    state, parts, at = start, [], 0
    for length in (10, 1, 1, 7, 10):
        piece = slice(at, at + length)
        state, logits = apply(lm, state, x[:, piece], reset[:, piece])
        parts.append(logits)
        at += length
    assert_close(jnp.concatenate(parts, 1), want)
    assert_close(state, want_state)


def test_later_tokens_and_other_lanes_change_nothing(lm):
    x, reset = tokens(resets=[])
    start = busy(lm)
    _, want = apply(lm, start, x, reset)
    for t in (1, 13, 28):
        _, later = apply(lm, start, x.at[:, t:].set((x[:, t:] + 3) % VOCAB), reset)
        assert_close(later[:, :t], want[:, :t], 1e-6)
        assert jnp.abs(later[:, t:] - want[:, t:]).max() > 1e-4
    _, lanes = apply(lm, start, x.at[0].set(0), reset.at[0, 3].set(True))
    assert_close(lanes[1:], want[1:], 1e-6)
    order = jnp.array([2, 0, 1])
    swapped = jax.tree.map(lambda a: jnp.take(a, order, LANE_AXIS), start)
    state, logits = apply(lm, swapped, x[order], reset)
    assert_close(logits, want[order], 1e-5)


def test_nothing_crosses_a_reset(lm):
    x, reset = tokens(resets=[(0, 9), (1, 9), (2, 9)])
    state, got = apply(lm, busy(lm), x, reset)
    fresh = reset[:, 9:].at[:].set(False)
    want_state, want = apply(lm, lm.init_state(3), x[:, 9:], fresh)
    assert_close(got[:, 9:], want)
    assert_close(state, want_state)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_gradient_reaches_every_parameter_and_the_state_before(lm):
    x, reset = tokens(resets=[(0, 13)])
    start = busy(lm)
    definition, params = nnx.split(lm)

    def loss(params, start):
        lm = nnx.merge(definition, params)
        reading = lm.read(start, x, reset)
        return (lm.logits(reading.hidden_BTD) ** 2).mean() + reading.auxiliary

    for_params, for_state = jax.grad(loss, (0, 1), allow_int=True)(params, start)
    for leaf in floats((for_params, for_state)):
        assert jnp.isfinite(leaf).all()
    # Of the lanes without a reset, and so of the leaf as a whole, something must arrive.
    assert all(jnp.abs(leaf).max() > 0 for leaf in floats(for_params))
    assert any(jnp.abs(leaf).max() > 0 for leaf in floats(for_state))


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_layers_and_remat_change_only_speed(name):
    x, reset = tokens()
    want = model_with(*MEMORY_CASES[name])[1]
    expected = apply(want, want.init_state(3), x, reset)
    twin = model_with(*MEMORY_CASES[name], layers="unroll", remat="full")[1]
    assert_close(apply(twin, twin.init_state(3), x, reset), expected, 1e-5)


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_every_parameter_has_logical_axes_that_fit_its_shape(name):
    config, lm = model_with(*MEMORY_CASES[name])
    ranks = jax.tree.map(
        len, logical_axes(config, VOCAB), is_leaf=lambda axes: isinstance(axes, tuple)
    )
    assert ranks == jax.tree.map(lambda a: a.ndim, split(lm)[1])


def test_recurrent_tokens_are_read_and_rewritten_by_every_segment():
    """Segment by segment, from the paper: layers on [memory, X, memory], memory' at the end."""
    _, lm = model_with(*MEMORY_CASES["recurrent_tokens"])
    x, _ = tokens(20, resets=[])
    norm: RMSNorm = lm.norm
    memory = jnp.broadcast_to(lm.memory.start[...], (3, 3, WIDTH))
    parts = []
    for start in (0, 8, 16):
        text = lm.embedding[...][x[:, start : start + 8]]
        wide = jnp.concatenate([memory, text, memory], 1)
        no_reset = jnp.zeros(wide.shape[:2], bool)
        h = norm(lm.stack.read(lm.stack.init_state(3), wide, no_reset)[1])
        parts.append(lm.logits(h[:, 3:-3]))
        memory = h[:, -3:]
    _, got = apply(lm, lm.init_state(3), x, jnp.zeros((3, 20), bool))
    assert_close(got, jnp.concatenate(parts, 1))


def test_landmarks_end_every_block_and_predict_the_token_after_it():
    """The text with a landmark after every three tokens, read by the layers in one piece."""
    _, lm = model_with(*MEMORY_CASES["landmark"])
    x, no_reset = tokens(20, resets=[])
    words = lm.embedding[...][x]
    mark = jnp.broadcast_to(lm.memory.landmark[...], (3, 1, WIDTH))
    rows, predicts = [], []
    for t in range(20):
        rows.append(words[:, t : t + 1])
        if t % 3 == 2:
            rows.append(mark)
        predicts.append(len(rows) - 1)
    wide = jnp.concatenate(rows, 1)
    _, h, _ = lm.stack.read(lm.stack.init_state(3), wide, jnp.zeros(wide.shape[:2], bool))
    want = lm.logits(lm.norm(h)[:, np.array(predicts)])
    _, got = apply(lm, lm.init_state(3), x, no_reset)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(memory=RecurrentTokens(), dropout=0.1), "dropout=0.1 must be 0 with memory recurren"),
    ],
)
def test_a_memory_that_makes_no_sense_for_a_model_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        Model(pattern=("attention",), **fields)
    assert message in str(error.value)
