"""The mixture of memories: routing, and what a memory that is not chosen must not do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import FieldError
from memjax.mixers import DeltaNet, GatedDeltaNet, MoM
from memjax.mixers.deltanet import DeltaNetMixer
from memjax.mixers.gated_deltanet import GatedDeltaNetMixer
from memjax.mixers.mom import MoMMixer
from memjax.mixers.mom_gates import GATES

WIDTH, HEADS = 16, 2
INNER = sorted(GATES)


def mixer_of(**fields):
    config = MoM(heads=HEADS, chunk=8, **fields)
    mixer = MoMMixer(config, WIDTH, rngs=nnx.Rngs(0))
    definition, params = nnx.split(mixer)
    moved = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), params
    )
    return nnx.merge(definition, moved)


def inputs(length=29, batch=2):
    x_BTD = jax.random.normal(jax.random.key(2), (batch, length, WIDTH))
    return x_BTD, jnp.zeros((batch, length), bool)


def always(mixer, memory, x_BTD):
    """Inputs of which every token chooses `memory` first."""
    weight = jnp.zeros_like(mixer.router.weight[...]).at[memory, 0].set(1.0)
    mixer.router.weight[...] = weight
    return x_BTD.at[:, :, 0].set(5.0)


def memories(state, mixer):
    """[M, B, H, K, V]: each memory on its own."""
    memory_BHKV = state.memory_BHKV
    split = memory_BHKV.reshape(len(memory_BHKV), mixer.count, HEADS, *memory_BHKV.shape[2:])
    return jnp.moveaxis(split, 1, 0)


@pytest.mark.parametrize("inner", INNER)
def test_memories_that_are_not_chosen_keep_every_bit(inner):
    mixer = mixer_of(inner=inner, memories=3, top_k=1)
    x, reset = inputs()
    start, _ = mixer(mixer.init_state(2), *inputs(40))
    before = memories(start, mixer)
    assert all(np.abs(memory).max() > 0 for memory in before)
    for chosen in range(3):
        after = memories(mixer(start, always(mixer, chosen, x), reset)[0], mixer)
        for other in range(4):
            same = np.array_equal(before[other], after[other])
            assert same == (other not in (chosen, 3))  # the last is shared: it always changes


@pytest.mark.parametrize("inner", INNER)
def test_a_memory_sees_only_the_tokens_that_chose_it(inner):
    mixer = mixer_of(inner=inner, memories=3, top_k=2, shared=False, conv=None)
    x, reset = inputs(batch=1)
    state, _ = mixer(mixer.init_state(1), x, reset)
    _, chosen_BTM = mixer.route(x)
    assert (chosen_BTM.sum(-1) == 2).all()
    for m, memory in enumerate(memories(state, mixer)):
        taken = np.flatnonzero(chosen_BTM[0, :, m])
        assert 0 < len(taken) < x.shape[1]
        alone, _ = mixer(mixer.init_state(1), x[:, taken], reset[:, : len(taken)])
        np.testing.assert_allclose(memories(alone, mixer)[m], memory, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("inner", ["gated_delta", "delta"])
def test_one_memory_chosen_always_is_its_inner_recurrence(inner, memory):
    mixer = mixer_of(inner=inner, memories=3, top_k=1, shared=False)
    x, reset = inputs()
    x, reset = always(mixer, memory, x), reset.at[0, 11].set(True)
    rows = slice(memory * WIDTH, (memory + 1) * WIDTH)
    scalar_rows = slice(memory * HEADS, (memory + 1) * HEADS)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    weight = {name: params[name]["project"]["weight"] for name in ("query", "key", "value")}
    conv = {name: params[name]["conv"]["weight"] for name in ("query", "key", "value")}
    for name in ("key", "value"):
        weight[name], conv[name] = weight[name][rows], conv[name][:, rows]
    beta = {"weight": params["gates"]["beta"]["weight"][scalar_rows]}
    own = {n: {"project": {"weight": weight[n]}, "conv": {"weight": conv[n]}} for n in weight}
    if inner == "delta":
        twin = DeltaNetMixer(DeltaNet(heads=HEADS), WIDTH, rngs=nnx.Rngs(1))
        readout = {name: params["readout"][name] for name in ("norm", "out")}
        own |= {"beta": beta, "readout": readout}
        mixer.readout.gate.weight[...] = jnp.zeros((WIDTH, WIDTH)).at[:, 0].set(10.0)
        factor = jax.nn.silu(50.0)  # of the gate at x_0 = 5
    else:
        config = GatedDeltaNet(heads=HEADS, key_size=WIDTH // HEADS, value_size=WIDTH // HEADS)
        twin = GatedDeltaNetMixer(config, WIDTH, rngs=nnx.Rngs(1))
        decay = {"weight": params["gates"]["decay"]["weight"][scalar_rows]}
        own |= {name: params["gates"][name] for name in ("log_rate", "step_bias")}
        own |= {"beta": beta, "decay": decay, "readout": params["readout"]}
        factor = 1.0
    nnx.update(twin, nnx.State(own))
    want_state, want = twin(twin.init_state(2), x, reset)
    state, y = mixer(mixer.init_state(2), x, reset)
    np.testing.assert_allclose(y, factor * want, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    mine = memories(state, mixer)[memory]
    np.testing.assert_allclose(mine, want_state.memory_BHKV, rtol=1e-5, atol=1e-5)


def test_load_balance_loss_is_that_of_the_paper_and_reaches_the_router():
    mixer = mixer_of(memories=4, top_k=2, balance=0.5)
    x, reset = inputs()
    scores = np.asarray(x, np.float64) @ np.asarray(mixer.router.weight[...], np.float64).T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counts = np.zeros(4)
    for row in p.reshape(-1, 4):
        counts[np.argsort(-row)[:2]] += 1
    want = 0.5 * 4 * np.sum(counts / p[..., 0].size * p.mean((0, 1)))
    start = mixer.init_state(2)
    loss = mixer.auxiliary_loss(start, x, reset)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    gradient = jax.grad(lambda x: mixer.auxiliary_loss(start, x, reset))(x)
    assert np.abs(gradient).max() > 0
    mixer.router.weight[...] = jnp.zeros((4, WIDTH))  # balanced in probability
    np.testing.assert_allclose(mixer.auxiliary_loss(start, x, reset), 0.5 * 2, rtol=1e-6)


def test_of_equal_probabilities_the_first_memories_are_chosen():
    mixer = mixer_of(memories=3, top_k=2)
    mixer.router.weight[...] = jnp.zeros((3, WIDTH))
    _, chosen_BTM = mixer.route(inputs()[0])
    np.testing.assert_array_equal(chosen_BTM, np.broadcast_to([1, 1, 0], chosen_BTM.shape))


def test_routing_of_bfloat16_activations_is_decided_in_float32():
    mixer = mixer_of(memories=3, top_k=1)
    x = inputs()[0].astype(jnp.bfloat16)
    p_BTM, chosen_BTM = mixer.route(x)
    assert p_BTM.dtype == jnp.float32
    np.testing.assert_array_equal(chosen_BTM, mixer.route(x.astype(jnp.float32))[1])
    np.testing.assert_allclose(p_BTM.sum(-1), 1, rtol=1e-6)


def test_more_choices_than_memories_are_refused():
    with pytest.raises(FieldError, match="top_k=3 must be at most memories=2"):
        dataclasses.replace(MoM(memories=2), top_k=3)
