"""The training step: its loss, its gradient's reach, its carry, and what it refuses to take in."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from memjax import cross_entropy
from memjax.config import ConfigError, to_json
from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import Model, logical_axes, merge
from memjax.sharding import Mesh
from memjax.training import step as steps
from memjax.training.config import Optimizer, Train
from memjax.training.optim import make_optimizer
from memjax.training.step import make_step, make_trainer, put_batch

VOCAB, ROWS, LENGTH = 11, 4, 6
MODEL = Model(
    d_model=8, pattern=("lstm",), repeat=2, mixers={"lstm": LSTM(unroll=1)}, mlp=None, tied=False
)
STILL = Optimizer(learning_rate=1e-30, schedule="constant", warmup=0, weight_decay=0.0)
MOVING = dataclasses.replace(STILL, learning_rate=1e-2)
AVERAGED = dataclasses.replace(MOVING, ema=0.8)


def experiment(*, model=MODEL, optimizer=STILL, mesh=Mesh(data=1), **train):
    train = Train(**{"carry": True, "steps": 100, **train})
    data = Data(sequence=LENGTH, batch=ROWS, stream="documents")
    return Experiment(model=model, data=data, optimizer=optimizer, train=train, mesh=mesh)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(tmp_path_factory):
    """Programs that several configs share, such as the initial state, compile once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


COMPILED = {}


def trainer_of(config, vocab_size=VOCAB):
    """A trainer; tests of one config share its compilation."""
    key = (to_json(config), vocab_size)
    if key not in COMPILED:
        COMPILED[key] = make_trainer(config, vocab_size)
    return COMPILED[key]


def batch(seed=0, segments=1, low=0, high=VOCAB):
    generator = np.random.default_rng(seed)
    shape = (ROWS, LENGTH * segments)
    return {
        "tokens_BT": generator.integers(low, high, shape).astype(np.int32),
        "targets_BT": generator.integers(low, high, shape).astype(np.int32),
        "weight_BT": (generator.random(shape) < 0.7).astype(np.float32),
        "reset_BT": generator.random(shape) < 0.1,
    }


def segment(whole, index):
    return {k: v[:, index * LENGTH : (index + 1) * LENGTH] for k, v in whole.items()}


def run(config, batches):
    """The state after these batches, and the metrics of each."""
    trainer = trainer_of(config)
    state, metrics = trainer.init(), []
    for one in batches:
        state, values = trainer.step(state, put_batch(one, trainer.mesh))
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


def gradient_of(config, state, one):
    """Gradient of the loss for the parameters, through the step's own function."""
    trainer = trainer_of(config)
    gradient = steps._gradient(config, trainer.definition)
    tokens = jnp.sum(one["weight_BT"])
    arrays = jax.tree.map(jnp.asarray, one)
    return jax.jit(gradient)(state.params, state.memory, arrays, jax.random.key(0), tokens)


def assert_close(got, expected, **tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


def test_loss_is_the_weighted_mean_of_the_global_batch():
    config, one = experiment(z_loss=0.1), batch()
    trainer = trainer_of(config)
    state = trainer.init()
    lm = merge(trainer.definition, state.params)
    tokens_BT, reset_BT = jnp.asarray(one["tokens_BT"]), jnp.asarray(one["reset_BT"])
    _, logits_BTY = lm(lm.init_state(ROWS), tokens_BT, reset_BT)
    logits_BTY = np.asarray(logits_BTY, np.float64)
    z_BT = np.log(np.exp(logits_BTY).sum(-1))
    target_BT = np.take_along_axis(logits_BTY, one["targets_BT"][..., None], -1)[..., 0]
    weight_BT = one["weight_BT"]
    _, (metrics,) = run(config, [one])
    nll = (weight_BT * (z_BT - target_BT)).sum() / weight_BT.sum()
    np.testing.assert_allclose(metrics.loss, nll, rtol=1e-6)
    np.testing.assert_allclose(metrics.z, (weight_BT * z_BT**2).sum() / weight_BT.sum(), rtol=1e-6)
    assert metrics.tokens == weight_BT.sum()


def test_accumulation_equals_the_whole_batch():
    batches = [batch(0), batch(1)]
    batches[0]["weight_BT"][0] = 0  # parts of unequal weight: a mean of means would differ
    whole, expected = run(experiment(optimizer=MOVING), batches)
    for parts in (2, 4):
        state, metrics = run(experiment(optimizer=MOVING, accumulate=parts), batches)
        for got, wanted in zip(metrics, expected):
            np.testing.assert_allclose(got, wanted, rtol=2e-6)
        assert_close(state.memory, whole.memory, atol=1e-6)
        assert_close(state.params, whole.params, atol=2e-5)  # Adam divides by small gradients


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_gradient_reaches_exactly_the_configured_depth(horizon):
    """Token 10 is an input of the first of 3 segments alone; the loss is of the last alone."""
    whole = batch(segments=3, high=10)
    whole["reset_BT"][:] = False
    whole["tokens_BT"][:, 2] = 10
    whole["weight_BT"][:, : 2 * LENGTH] = 0
    config = experiment(horizon=horizon)
    pieces = [segment(whole, i) for i in range(3)]
    before, last = pieces[: 3 - horizon], pieces[3 - horizon :]
    state, _ = run(experiment(), before)
    read = {k: np.concatenate([piece[k] for piece in last], 1) for k in whole}
    _, grads, memory = gradient_of(config, state, read)
    reached = float(jnp.abs(grads["embedding"][10]).max())
    assert (reached > 1e-8) == (horizon == 3)
    # The memory did bring token 10 along, in every case.
    changed = {k: v.copy() for k, v in whole.items()}
    changed["tokens_BT"][:, 2] = 9
    other, _ = run(experiment(), [segment(changed, i) for i in range(3)])
    difference = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(other.memory))
    ]
    assert max(difference) > 1e-6


def test_carried_steps_equal_the_whole_document_at_once():
    whole = batch(segments=3)
    expected, (one,) = run(experiment(horizon=3), [whole])
    state, metrics = run(experiment(), [segment(whole, i) for i in range(3)])
    assert_close(state.memory, expected.memory, atol=1e-6)
    nats = sum(float(m.loss * m.tokens) for m in metrics)
    np.testing.assert_allclose(nats / sum(m.tokens for m in metrics), one.loss, rtol=1e-6)


def test_without_carry_no_memory_is_kept_between_steps():
    first, second = batch(0), batch(1)
    state, metrics = run(experiment(carry=False), [first, second])
    assert state.memory == ()
    _, alone = run(experiment(carry=False), [second])
    np.testing.assert_allclose(metrics[1].loss, alone[0].loss, rtol=1e-6)
    _, carried = run(experiment(), [first, second])
    assert abs(carried[1].loss - alone[0].loss) > 1e-5


def test_a_batch_without_targets_changes_nothing_but_the_memory():
    empty = batch()
    empty["weight_BT"][:] = 0
    state, (metrics,) = run(experiment(), [empty])
    assert metrics.finite and metrics.loss == 0 and metrics.tokens == 0
    assert_close(state.params, trainer_of(experiment()).init().params, atol=0)


def test_a_step_that_is_not_finite_leaves_the_state_bit_for_bit():
    config = experiment(optimizer=AVERAGED)
    trainer = trainer_of(config)
    state = trainer.init()
    table = state.params["embedding"].at[5].set(jnp.nan)
    state = state._replace(params=state.params | {"embedding": table})
    good, poisoned = batch(0, high=5), batch(1, high=5)
    poisoned["tokens_BT"][2, 3] = 5
    skipped, in_row, finite = [], [], []
    for one in (good, poisoned, poisoned, good):
        before = jax.device_get(state)
        state, metrics = trainer.step(state, put_batch(one, trainer.mesh))
        skipped.append(int(state.skipped))
        in_row.append(int(state.skipped_in_row))
        finite.append(bool(metrics.finite))
        names = ("params", "opt_state", "memory", "ema")
        same = [
            np.asarray(a).tobytes() == np.asarray(b).tobytes()
            for name in names
            for a, b in zip(
                jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(before, name))
            )
        ]
        assert all(same) != metrics.finite
        assert int(state.step) == int(before.step) + 1
    assert finite == [True, False, False, True]
    assert skipped == [0, 1, 2, 2] and in_row == [0, 1, 2, 0]


def test_average_of_the_weights_by_definition():
    config = experiment(optimizer=AVERAGED)
    trainer = trainer_of(config)
    state = trainer.init()
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for seed in range(4):
        state, _ = trainer.step(state, put_batch(batch(seed), trainer.mesh))
        mean = jax.tree.map(lambda m, p: 0.8 * m + 0.2 * np.float64(p), mean, state.params)
    assert_close(state.ema, mean, atol=1e-6)


def test_steps_compile_once_and_learn():
    trainer = trainer_of(experiment(optimizer=MOVING))
    state, one = trainer.init(), batch()
    losses = []
    for _ in range(20):
        state, metrics = trainer.step(state, put_batch(one, trainer.mesh))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert trainer.step._cache_size() == 1


def test_many_logits_are_scored_in_parts_with_the_same_result(monkeypatch):
    state, _ = run(experiment(), [])
    sums, grads, _ = gradient_of(experiment(z_loss=0.1), state, batch())
    monkeypatch.setitem(cross_entropy.LOGITS, "cpu", ROWS * LENGTH * VOCAB // 4)
    in_parts, parts_grads, _ = gradient_of(experiment(z_loss=0.1), state, batch())
    np.testing.assert_allclose(in_parts, sums, rtol=1e-6)
    assert_close(parts_grads, grads, atol=1e-6)


def test_dropout_differs_by_step_and_micro_batch_and_repeats_with_the_seed():
    model = dataclasses.replace(MODEL, dropout=0.5)
    one = batch()
    for array in one.values():
        array[ROWS // 2 :] = array[: ROWS // 2]
    one["reset_BT"][:, 0] = True
    _, first = run(experiment(model=model), [one, one])
    _, again = run(experiment(model=model), [one, one])
    _, other = run(experiment(model=model, accumulate=2), [one, one])
    assert first[0].loss == again[0].loss and first[1].loss == again[1].loss
    assert first[0].loss != first[1].loss
    assert other[0].loss != first[0].loss


def test_a_batch_that_parts_do_not_divide_is_refused():
    config = experiment(mesh=Mesh(data=1))
    data = dataclasses.replace(config.data, batch=6)
    train = dataclasses.replace(config.train, accumulate=3)
    config = dataclasses.replace(config, data=data, train=train)
    trainer_of(config)
    with pytest.raises(ConfigError, match="accumulate"):
        dataclasses.replace(config, train=dataclasses.replace(train, accumulate=4))


MESHES = """
import dataclasses, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, "tests")
import test_training_step as t
from memjax.sharding import Mesh
from memjax.training.config import Optimizer
from memjax.training.step import put_batch

t.ROWS, compiled = 8, []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration")
    else None)
optimizer = Optimizer(schedule="constant", warmup=0, ema=0.9)
single, expected = t.run(t.experiment(optimizer=optimizer, horizon=2), [
    t.batch(seed, segments=2) for seed in range(3)])
for mesh in (Mesh(data=8), Mesh(data=2, fsdp=4)):
    config = t.experiment(optimizer=optimizer, horizon=2, mesh=mesh)
    state, metrics = t.run(config, [t.batch(seed, segments=2) for seed in range(3)])
    for got, wanted in zip(metrics, expected):
        np.testing.assert_allclose(got, wanted, rtol=2e-5)
    t.assert_close(state.memory, single.memory, atol=1e-5)
    t.assert_close(state.ema, single.ema, atol=1e-4)
    trainer = t.trainer_of(config, t.VOCAB)
    live = trainer.init()
    live, _ = trainer.step(live, put_batch(t.batch(0, segments=2), trainer.mesh))
    batches = [put_batch(t.batch(seed, segments=2), trainer.mesh) for seed in range(3)]
    assert compiled
    compiled.clear()
    for batch in batches:
        live, _ = trainer.step(live, batch)
    assert not compiled, compiled
    for leaf, wanted in zip(jax.tree.leaves(live), jax.tree.leaves(trainer.abstract)):
        assert leaf.sharding == wanted.sharding, (leaf.sharding, wanted.sharding)
    moments = live.opt_state[1][0].mu["embedding"]
    assert moments.sharding == live.params["embedding"].sharding
    shard = live.params["embedding"].addressable_shards[0].data.shape
    assert shard == (t.VOCAB, 8 // mesh.fsdp), shard
    lanes = jax.tree.leaves(live.memory)[0].addressable_shards[0].data.shape
    assert lanes[1] == 1, lanes
print("same")
"""


def test_eight_devices_equal_one_and_hold_their_share():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MESHES], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-3000:]


def test_the_step_is_pure_and_runs_uncompiled():
    config = experiment()
    trainer = trainer_of(config)
    optimizer, schedule = make_optimizer(config.optimizer, 100, logical_axes(MODEL, VOCAB))
    step = make_step(config, trainer.definition, optimizer, schedule)
    state, one = trainer.init(), jax.tree.map(jnp.asarray, batch())
    first = step(state, one)[1]
    assert first == step(state, one)[1]
    np.testing.assert_allclose(first.loss, run(config, [batch()])[1][0].loss, rtol=1e-6)
