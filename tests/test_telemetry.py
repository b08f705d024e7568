"""What layers say of themselves, against definitions; by token, and out of loops over segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, apply, mixer_of, segment
from flax import nnx
from oracles.mixers.landmark import head as read_landmarks
from oracles.mixers.memorizing import recalled
from oracles.mixers.parts import unit

from memjax import telemetry
from memjax.memory import MEMORIES, LandmarkMemory, RecurrentTokens
from memjax.mixers import MIXERS, Attention, GatedDeltaNet
from memjax.model import LanguageModel, Model

RESETS = [(0, 0), (1, 9), (2, 20)]
BY_MEASURES_ALONE = set()  # norm, written, forget and rank, which are taken from outside
TOLD = {
    "attention": {"slot_use"},
    "all_attention": {"slot_use"},
    "linear_attention": {"forget_rate"},
    "gated_deltanet": {"forget_rate", "write_rate"},
    "lstm": BY_MEASURES_ALONE,
    "base_conv": BY_MEASURES_ALONE,
    "based": BY_MEASURES_ALONE,
    "deltanet": {"write_rate"},
    "gla": {"forget_rate"},
    "linear_transformer": BY_MEASURES_ALONE,
    "mom": {"forget_rate", "write_rate", *(f"router_load_{i}" for i in range(4))},
    "retnet": {"forget_rate"},
    "mamba": {"forget_rate"},
    "rg_lru": {"forget_rate"},
    "mamba2": {"forget_rate"},
    "ttt_linear": {"moved"},
    "ttt_mlp": {"moved"},
    "mlstm": {"forget_rate", "level"},
    "hgrn2": {"forget_rate"},
    "titans_lmm": {"forget_rate", "write_rate"},
    "titans_mac": BY_MEASURES_ALONE,
    "titans_mag": {"forget_rate", "write_rate"},
    "titans_mal": {"forget_rate", "write_rate"},
    "miras": {"forget_rate", "write_rate"},
    "moneta": {"forget_rate", "write_rate"},
    "yaad": {"forget_rate", "write_rate"},
    "memora": {"forget_rate", "write_rate"},
    "compressive": {"slot_use", "compressed_slot_use"},
    "landmark": {"slot_use", "hit_distance"},
    "infini": {"gate"},
    "memorizing": {"slot_use", "gate", "hit_distance", "hit_similarity"},
    "transformer_xl": {"slot_use"},
}
TOLD_OF_MEMORIES = {
    "product_keys": {"slot_use", "largest_weight"},
    "memory_plus": {"slot_use", "largest_weight"},
    "lm2": BY_MEASURES_ALONE,
    "recurrent_tokens": BY_MEASURES_ALONE,
    "armt": BY_MEASURES_ALONE,
}


def told(config):
    """Names of what the only layer notes."""
    lm = nnx.eval_shape(lambda: LanguageModel(config, 31, rngs=nnx.Rngs(0)))
    definition, params = nnx.split(lm)

    def read(params):
        lm = nnx.merge(definition, params)
        tokens_BT = jnp.zeros((1, 8), jnp.int32)
        with telemetry.listening() as notes:
            lm.read(lm.init_state(1), tokens_BT, jnp.zeros((1, 8), bool))
        return notes

    return {path.rpartition("/")[2] for path in jax.eval_shape(read, params)}


@pytest.mark.slow  # traces every mixer
def test_what_every_kind_tells_of_itself():
    for kind in MIXERS:
        assert told(Model(d_model=64, pattern=(kind,), repeat=1)) == TOLD[kind], kind
    for kind, expected in TOLD_OF_MEMORIES.items():
        memory = MEMORIES[kind][0]()
        config = Model(d_model=64, pattern=("lstm",), repeat=1, memory=memory)
        assert told(config) == expected, kind
    of_mixers = {kind for kind, (_, module) in MEMORIES.items() if module is None}
    assert of_mixers <= {*MIXERS, "persistent"}  # which is `all_attention` where it attaches
    assert set(TOLD_OF_MEMORIES) | of_mixers | {"landmark"} == set(MEMORIES)


@jax.jit
def notes_by_token(mixer, state, x_BTD, reset_BT):
    with telemetry.listening() as notes, telemetry.by_token(*reset_BT.shape):
        mixer(state, x_BTD, reset_BT)
    return notes


def project(mixer, x_D, heads):
    return [
        (np.asarray(getattr(mixer, name).weight[...], np.float64) @ x_D).reshape(heads, -1)
        for name in ("query", "key", "value")
    ]


def hits_of_memorizing(mixer, config, x_TD, reset_T):
    """Of each token, by head: what is recalled if values are places, and the best cosine."""
    for t, x_D in enumerate(np.asarray(x_TD, np.float64)):
        if t == 0 or reset_T[t]:
            past, current = [], []
        if len(current) == config.segment:
            past, current = past + current, []
        q_HK, k_HK, _ = project(mixer, x_D, config.heads)
        q_HK, k_HK = unit(q_HK), unit(k_HK)
        current.append((k_HK, np.full((config.heads, 1), t)))
        memory = past[-config.memory :]
        scale_H = np.sqrt(q_HK.shape[-1]) * np.abs(np.asarray(mixer.scale[...], np.float64))
        distance, cosine = np.full((2, config.heads), np.nan)
        for h in range(config.heads if memory else 0):
            (place,) = recalled(np.array(q_HK[h]), memory, h, config, scale_H[h])
            distance[h] = t - place
            cosine[h] = max(q_HK[h] @ k[h] for k, _ in memory)
        yield distance.mean(), cosine.mean()


def hits_of_landmark(mixer, config, x_TD, reset_T):
    """Of each token: what is read if values are places and 1 in other blocks, and 0 in its own."""
    for t, x_D in enumerate(np.asarray(x_TD, np.float64)):
        if t == 0 or reset_T[t]:
            past, current = [], []
        if len(current) == config.block + 1:
            past, current = [*past, current][-config.blocks :], []
        q_HK, k_HK, _ = project(mixer, x_D, config.heads)
        current.append((k_HK, np.tile([t, 1.0], (config.heads, 1))))
        whole = len(current) == config.block + 1
        own = [(k, 0 * v) for k, v in (current[:-1] if whole else current)]
        distances = [np.nan]
        if past:
            reads = [
                read_landmarks(h, q_HK, past, own, len(current) - 1, config)
                for h in range(config.heads)
            ]
            distances = [t - place / share for place, share in reads]
        yield np.mean(distances), len(past) / config.blocks


@pytest.mark.parametrize(
    ("name", "define", "names"),
    [
        ("memorizing", hits_of_memorizing, ("hit_distance", "hit_similarity")),
        ("landmark", hits_of_landmark, ("hit_distance", "slot_use")),
        ("landmark-all", hits_of_landmark, ("hit_distance", "slot_use")),
    ],
)
def test_hits_are_those_of_the_definition_wherever_a_text_is_split(name, define, names):
    mixer, config = mixer_of(name), CONFIGS[name]
    x_BTD, reset_BT = segment(40, resets=RESETS)
    want = np.array([[*define(mixer, config, x, r)] for x, r in zip(x_BTD, np.asarray(reset_BT))])
    state, _ = apply(mixer, mixer.init_state(3), x_BTD[:, :17], reset_BT[:, :17])
    pieces = [
        notes_by_token(mixer, mixer.init_state(3), x_BTD[:, :17], reset_BT[:, :17]),
        notes_by_token(mixer, state, x_BTD[:, 17:], reset_BT[:, 17:]),
    ]
    for i, note in enumerate(names):
        got = np.concatenate([piece[note] for piece in pieces], 1)
        np.testing.assert_allclose(got, want[..., i], rtol=1e-4, atol=1e-5, err_msg=note)
    assert np.isnan(want[..., 0]).any() and np.isfinite(want[..., 0]).sum() > 30


def test_a_note_by_token_is_a_mean_over_the_rest_and_leaves_nothing_out():
    value = jnp.asarray([[[1.0, 3.0], [jnp.nan, 5.0]], [[jnp.nan, jnp.nan], [0.0, 0.0]]])
    with telemetry.listening() as notes:
        telemetry.note("whole", value)
        with telemetry.by_token(2, 2):
            telemetry.note("apart", value)
            telemetry.note("scalar", 7.0)
    assert notes["whole"] == np.mean([1, 3, 5, 0, 0])
    np.testing.assert_array_equal(notes["apart"], [[2, 5], [np.nan, 0]])
    np.testing.assert_array_equal(notes["scalar"], np.full((2, 2), 7))


@pytest.mark.parametrize(
    "memory", [RecurrentTokens(slots=2, segment=4), LandmarkMemory(block=2, blocks=3, segment=4)]
)
def test_layers_are_heard_inside_of_segments(memory):
    """Notes of two halves, unfinished segments in both, have the mean of the whole's."""
    mixers = {"attention": Attention(heads=2), "gated_deltanet": GatedDeltaNet(heads=2, chunk=8)}
    config = Model(
        d_model=16, pattern=tuple(mixers), repeat=2, mixers=mixers, memory=memory, mlp=None
    )
    lm = LanguageModel(config, 31, rngs=nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(0), (2, 14), 0, 31)

    @jax.jit
    def read(lm, state, tokens_BT):
        with telemetry.listening() as notes:
            reading = lm.read(state, tokens_BT, jnp.zeros(tokens_BT.shape, bool))
        return reading.state, notes

    _, whole = read(lm, lm.init_state(2), tokens_BT)
    state, first = read(lm, lm.init_state(2), tokens_BT[:, :7])
    _, second = read(lm, state, tokens_BT[:, 7:])
    name = "patterns/1_gated_deltanet/forget_rate"
    assert whole[name].shape == (2,) and (whole[name] > 0).all()
    np.testing.assert_allclose(whole[name], (first[name] + second[name]) / 2, rtol=1e-5)
    if memory.kind == "landmark":
        name = "patterns/0_attention/hit_distance"
        assert (whole[name] > 1).all() and (whole[name] < 4 * 3).all()
