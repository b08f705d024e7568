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
from oracles.memories.armt import armt_read, armt_write

from memjax.architecture import Model
from memjax.config import ConfigError
from memjax.layers import RMSNorm
from memjax.memory import (
    ARMT,
    LM2,
    MEMORIES,
    CompressiveMemory,
    LandmarkMemory,
    MemorizingMemory,
    MemoryPlus,
    Persistent,
    ProductKeys,
    RecurrentTokens,
)
from memjax.memory.armt import ARMTLayer, AssociativeState, features, recall
from memjax.mixers import LSTM, MIXERS, Attention, GatedDeltaNet, Infini, TransformerXL
from memjax.model import LANE_AXIS, LanguageModel, logical_axes, split
from memjax.positions import ALiBi

VOCAB = 31
MEMORY_CASES = {
    "recurrent_tokens": (RecurrentTokens(slots=3, segment=8), ("attention", "lstm")),
    "product_keys": (
        ProductKeys(keys=5, heads=2, top_k=3, query_size=6, at=(1,)),
        ("infini", "lstm"),
    ),
    "armt": (ARMT(slots=3, segment=8, memory_size=5), ("attention", "lstm")),
    "lm2": (LM2(slots=3, segment=5, heads=2, at=(0,)), ("transformer_xl", "lstm")),
    "memory_plus": (
        MemoryPlus(keys=6, heads=2, top_k=4, query_size=6, value_size=7),
        ("gated_deltanet",),
    ),
    "persistent": (Persistent(slots=5), ("attention", "gated_deltanet")),
    "recurrent_tokens-delta": (RecurrentTokens(slots=2, segment=5), ("gated_deltanet",)),
    "memorizing": (
        MemorizingMemory(layers=("recall",), memory=9, neighbours=3, segment=4, cache=3),
        ("attention", "recall"),
    ),
    "landmark": (LandmarkMemory(block=3, blocks=4, segment=6), ("softmax", "lstm")),
    "compressive": (
        CompressiveMemory(memory=5, compressed=3, segment=4, rate=2),
        ("softmax",),
    ),
}
MIXER_CONFIGS = {
    "attention": Attention(context=32),
    "softmax": Attention(heads=2),
    "recall": Attention(heads=2, position=ALiBi()),
    "gated_deltanet": GatedDeltaNet(chunk=8, heads=2),
    "lstm": LSTM(),
    "infini": Infini(heads=2, segment=5),
    "transformer_xl": TransformerXL(heads=2, memory=6, segment=7, chunk=12),
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
    """As a memory, or, of those that are mixers, as a mixer of the pattern."""
    cases = {memory.kind for memory, _ in MEMORY_CASES.values()}
    assert cases >= {kind for kind, (_, module) in MEMORIES.items() if module is not None}
    mixers = {name for _, pattern in MEMORY_CASES.values() for name in pattern}
    assert cases | (mixers & set(MIXERS)) >= set(MEMORIES)


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

    for_params, for_state = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(params, start)
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


def test_armt_layers_read_and_write_as_in_the_paper():
    """Segment by segment and layer by layer; between reading and writing, our layers."""
    memory, pattern = MEMORY_CASES["armt"]
    lm = model_with(memory, pattern)[1]
    x, reset = tokens(resets=[])
    blocks = [
        jax.tree.map(lambda a, r=r: a[r], block)  # layers of the pattern, repeat by repeat
        for r in range(2)
        for block in lm.stack.patterns.blocks.values()
    ]
    params = [
        jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(block.part)))
        for block in blocks
    ]

    @jax.jit
    def layer(block, h):
        start, no_reset = block.mixer.init_state(3), jnp.zeros((3, 11), bool)
        h += block.mixer(start, block.mixer_norm(h), no_reset)[1]
        return h + block.mlp(block.mlp_norm(h))

    size = 2 * memory.order * memory.memory_size
    kept = [[(np.zeros((size, WIDTH)), np.zeros(size)) for _ in range(3)] for _ in blocks]
    outputs = []
    for start in (0, 8, 16):
        text = lm.embedding[...][x[:, start : start + 8]]
        slots = jnp.broadcast_to(lm.memory.tokens[...], (3, 3, WIDTH))
        h = np.asarray(jnp.concatenate([text, slots], 1), np.float64)
        for block, own, state in zip(blocks, params, kept):
            for lane, (A, z) in enumerate(state):
                h[lane] += [armt_read(own, memory, A, z, token) for token in h[lane]]
            h = np.array(layer(block, jnp.asarray(h, jnp.float32)), np.float64)
            for lane, (A, z) in enumerate(state):
                state[lane] = armt_write(own, memory, A, z, h[lane, -3:])
        outputs.append(lm.norm(jnp.asarray(h[:, :-3], jnp.float32)))
    state, logits = apply(lm, lm.init_state(3), x, reset)
    assert_close(logits[:, :24], lm.logits(jnp.concatenate(outputs, 1)), 2e-4)
    layers = state.memory.layers
    for i, want in enumerate(kept):
        got = jax.tree.map(lambda a, i=i: a[0, :, i // 2], layers.patterns[i % 2])
        for lane, (A, z) in enumerate(want):
            np.testing.assert_allclose(got.memory_BFD[lane], A, rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(got.total_BF[lane], z, rtol=2e-4, atol=2e-4)


def armt_layer(slots):
    """A layer, features of a key that all its slots shall have, what they write, and how much."""
    layer = moved(ARMTLayer(ARMT(slots=slots, memory_size=5), WIDTH, rngs=nnx.Rngs(0)))
    x_BMD = jnp.repeat(jax.random.normal(jax.random.key(3), (1, 1, WIDTH)), slots, 1)
    phi_BMF = features(layer.key(x_BMD), layer.order)
    beta = jax.nn.sigmoid(layer.rate(x_BMD))[0, 0, 0]
    return layer, x_BMD, phi_BMF[:, :1], layer.value(x_BMD)[:, :1], beta


@pytest.mark.parametrize("slots", [2, 6])
def test_armt_slots_of_one_key_correct_what_it_recalls_once_each(slots):
    """The key's error is 1 - slots * beta of what it was, where the normaliser has the key once."""
    layer, x, phi, wanted, beta = armt_layer(slots)
    state = AssociativeState(phi[0, :, :, None] * jnp.arange(1.0, WIDTH + 1), phi[0])
    after = layer.write(state, x)
    error, error_after = (wanted - recall(each, phi) for each in (state, after))
    assert_close(error_after, (1 - slots * beta) * error)


def test_armt_writes_features_that_its_normaliser_never_gets():
    """Where one feature of a key is there more than the whole key: the others are recalled by
    queries of them alone at 1 / eps of their size."""
    layer, x, phi, value, beta = armt_layer(1)
    most = jnp.argmax(phi[0, 0])
    total = jnp.zeros_like(phi[0]).at[0, most].set(2 * jnp.sum(phi**2) / phi[0, 0, most])
    after = layer.write(AssociativeState(jnp.zeros((*total.shape, WIDTH)), total), x)
    assert_close(after.total_BF, total)
    others = phi.at[0, 0, most].set(0)
    assert_close(recall(after, others), beta * jnp.sum(others * phi) / 1e-5 * value)


@pytest.mark.parametrize("kind", ["recurrent_tokens", "armt"])
def test_gradient_reaches_every_segment_of_the_document_and_nothing_before(kind):
    """Seen from token 25 through what the layers make of it; each token has an id of its own."""
    lm = model_with(MEMORY_CASES[kind][0], ("lstm",))[1]
    x, reset = jnp.arange(LENGTH)[None], jnp.zeros((1, LENGTH), bool).at[0, 3].set(True)
    start = lm.init_state(1)

    @jax.jit
    @jax.grad
    def gradient(table):
        definition, params = split(lm)
        twin = nnx.merge(definition, nnx.State(params | {"embedding": table}))
        return (twin.read(start, x, reset).hidden_BTD[:, 25] ** 2).sum()

    reached = np.abs(gradient(lm.embedding[...])).max(-1)
    assert set(np.flatnonzero(reached > 0)) == set(range(3, 26))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(memory=RecurrentTokens(), dropout=0.1), "dropout=0.1 must be 0 with memory recurren"),
        (dict(memory=ProductKeys(), mlp=None), "mlp=None product_keys replaces the MLP of a block"),
        (dict(memory=LM2(slots=300)), "slots=300 must be at most d_model=256: slots start as"),
        (dict(memory=MemoryPlus(at=(1,))), "at=(1,) must name places of the pattern, 0 to 0"),
        (
            dict(memory=Persistent(), pattern=("lstm",)),
            "memory='persistent' replaces attention, of",
        ),
        (
            dict(memory=Persistent(), mixers=dict(attention=Attention(kv_heads=2))),
            "mixers.attention.kv_heads=2 has no place in memory persistent; leave it out",
        ),
    ],
)
def test_a_memory_that_makes_no_sense_for_a_model_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        Model(**{"pattern": ("attention",), **fields})
    assert message in str(error.value)
