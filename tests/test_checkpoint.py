"""Checkpoints: what is read is what was written, or it is said; the folder of a run."""

import dataclasses
import fcntl
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config import ConfigError
from memjax.data import Data
from memjax.data.tokenizers import Bytes
from memjax.experiment import Experiment
from memjax.model import Model
from memjax.training import checkpoint, workdir
from memjax.training.checkpoint import Checkpoints, read_params
from memjax.training.config import Optimizer, Train
from memjax.training.digest import digests
from memjax.training.errors import CheckpointError
from memjax.training.step import TrainState

MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
HERE = jax.NamedSharding(MESH, jax.P())


def state_of(seed, width=64, dtype=jnp.float32):
    key = jax.random.key(seed)
    params = {"a": {"weight": jax.random.normal(key, (width, 8), dtype)}, "b": jnp.ones(3)}
    state = TrainState(
        params=params,
        opt_state=(jax.tree.map(lambda x: 2 * x, params), jnp.int32(seed)),
        memory=({"cell": jax.random.normal(jax.random.fold_in(key, 1), (2, 4))},),
        ema=jax.tree.map(lambda x: x + 1, params),
        step=jnp.int32(seed),
        skipped=jnp.int32(0),
        skipped_in_row=jnp.int32(0),
        rng=key,
    )
    return jax.device_put(state, HERE)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE), state)


def same(left, right):
    """Whether every bit is the same; keys by what they hold."""

    def plain(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [plain(a) for a in jax.tree.leaves(left)] == [plain(a) for a in jax.tree.leaves(right)]


def saved(folder, *steps, keep=9, keep_best=0, losses=None):
    checkpoints = Checkpoints(folder, keep, keep_best)
    for step in steps:
        checkpoints.save(step, state_of(step), {"eval_loss": (losses or {}).get(step), "n": step})
    checkpoints.wait()
    return checkpoints


def largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "params" in path.parts]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_memory_without_entries_is_restored_with_its_shape(tmp_path):
    """Orbax refuses arrays of no size; a window of one token has such a cache."""
    cache = jnp.zeros((2, 0, 4), jnp.float32)
    state = jax.device_put(state_of(1)._replace(memory=(cache,)), HERE)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract(state))
    assert restored.state.memory[0].shape == (2, 0, 4)
    assert same(restored.state, state)


def test_what_is_restored_is_what_was_saved(tmp_path):
    restored = saved(tmp_path, 1, 2).restore(abstract(state_of(0)))
    assert restored.step == 2 and restored.report == [] and restored.meta["n"] == 2
    assert same(restored.state, state_of(2)) and not same(restored.state, state_of(1))
    assert jax.random.uniform(restored.state.rng) == jax.random.uniform(state_of(2).rng)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert Checkpoints(tmp_path).restore(abstract(state_of(0))) is None


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), state_of(3, 4096)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)
    checkpoints.save(3, state, {})
    spoil(state.params)
    checkpoints.wait()
    assert same(checkpoints.restore(abstract(state_of(3, 4096))).state, state_of(3, 4096))


def test_one_flipped_bit_is_found_and_the_checkpoint_before_is_taken(tmp_path, monkeypatch):
    """Orbax reads some flips without a word; here the reader itself gives a wrong bit."""
    checkpoints, load = saved(tmp_path, 1, 2), checkpoint.ocp.load_checkpointables

    def wrong(path, wanted):
        loaded = load(path, wanted)
        if path.name == "2":
            words = loaded["params"]["params/a/weight"].view(jnp.uint32)
            flipped = words.at[5, 3].set(words[5, 3] ^ 1).view(jnp.float32)
            loaded["params"]["params/a/weight"] = flipped
        return loaded

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", wrong)
    restored = checkpoints.restore(abstract(state_of(0)))
    assert restored.step == 1 and same(restored.state, state_of(1))
    assert restored.report == [
        "checkpoint 2 is damaged and was left out: params/a/weight does not match its digest"
    ]


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, truncate, empty, os.remove])
def test_a_damaged_file_is_left_out_with_a_line_and_kept_aside(tmp_path, harm):
    checkpoints = saved(tmp_path, 1, 2)
    harm(largest(tmp_path / "2"))
    restored = checkpoints.restore(abstract(state_of(0)))
    assert restored.step == 1 and same(restored.state, state_of(1))
    (line,) = restored.report
    assert line.startswith("checkpoint 2 is damaged") and "\n" not in line
    assert checkpoints.steps() == [1] and (tmp_path / "2.damaged").is_dir()
    checkpoints.save(2, state_of(2), {})
    checkpoints.wait()
    assert same(checkpoints.restore(abstract(state_of(0))).state, state_of(2))


@pytest.mark.parametrize("harm", [flip, empty, os.remove])
def test_damaged_metadata_is_left_out(tmp_path, harm):
    checkpoints = saved(tmp_path, 1, 2)
    harm(tmp_path / "2" / "_CHECKPOINT_METADATA")
    assert checkpoints.restore(abstract(state_of(0))).step == 1


def test_if_all_are_damaged_nothing_is_begun_anew(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for step in "12":
        truncate(largest(tmp_path / step))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        checkpoints.restore(abstract(state_of(0)))
    assert checkpoints.steps() == [1, 2]


def test_half_written_and_half_deleted_folders_are_ignored_and_cleaned(tmp_path):
    saved(tmp_path, 1)
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17", "4.deleted"):
        (tmp_path / name / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpoints.restore(abstract(state_of(0))).step == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (state_of(0, width=32), r"params/a/weight is float32\[64, 8\] .* but float32\[32, 8\]"),
        (state_of(0, dtype=jnp.bfloat16), r"params/a/weight is float32\[64, 8\] .* but bfloat16"),
        (state_of(0)._replace(ema=()), r"ema/a/weight is float32\[64, 8\] .* but absent"),
    ],
)
def test_a_model_of_another_form_is_an_error_not_a_fallback(tmp_path, other, message):
    checkpoints = saved(tmp_path, 1, 2)
    # Orders of names differ: the first that differs is the one named.
    with pytest.raises(ConfigError, match=message.replace("params", "(params|ema)")):
        checkpoints.restore(abstract(other))
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({2: 1.0, 4: 3.0}, [2, 5, 6]),
        ({2: 2.0, 3: 1.0, 6: 0.5}, [5, 6]),
        ({}, [5, 6]),
        ({5: 1.0}, [5, 6]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, losses, kept):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, 6, keep=2, keep_best=1, losses=losses)
    assert checkpoints.steps() == kept
    assert (
        checkpoints.best_loss()
        == Checkpoints(tmp_path).best_loss()
        == (min(losses.values()) if losses else None)
    )


def test_a_save_that_fails_is_one_clear_error_and_older_ones_stay(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", full)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, state_of(2), {})
    text = str(caught.value)
    assert "step 2 cannot be written" in text and str(tmp_path) in text
    assert "No space left on device; those of steps 1 are intact" in text and "\n" not in text
    assert checkpoints.restore(abstract(state_of(0))).step == 1


def test_parameters_alone_are_read_and_the_average_is_preferred(tmp_path):
    saved(tmp_path, 1, 2)
    params = abstract(state_of(0)).params
    step, read = read_params(tmp_path, params)
    assert step == 2 and same(read, state_of(2).ema)
    assert same(read_params(tmp_path, params, ema=False)[1], state_of(2).params)
    assert same(read_params(tmp_path, params, 1, ema=False)[1], state_of(1).params)
    with pytest.raises(ConfigError, match="no checkpoint of step 7; choose from 1, 2"):
        read_params(tmp_path, params, 7)
    truncate(largest(tmp_path / "2"))
    assert read_params(tmp_path, params, ema=False)[0] == 1


def test_digests_see_every_bit_and_the_order():
    arrays = {
        "bool": jnp.array([True, False]),
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "word": jnp.arange(6, dtype=jnp.float32),
        "scalar": jnp.int32(3),
    }
    before = np.asarray(digests(arrays))
    for index, name in enumerate(sorted(arrays)):
        swapped = jnp.flip(arrays[name]) if arrays[name].ndim else jnp.int32(4)
        differs = np.asarray(digests(arrays | {name: swapped})) != before
        assert differs.tolist() == [i == index for i in range(4)]
    for bit in range(32):
        words = arrays["word"].view(jnp.uint32).at[2].add(jnp.uint32(1) << bit)
        assert np.asarray(digests({"word": words.view(jnp.float32)}))[0] != before[3]


EXPERIMENT = Experiment(model=Model(d_model=8, pattern=("lstm",)))


def test_a_run_with_another_config_is_refused_with_what_differs(tmp_path):
    workdir.write_run(tmp_path, EXPERIMENT, Bytes())
    anything = dataclasses.replace(EXPERIMENT, data=Data(batch=4))
    assert workdir.changes(tmp_path, anything) == {}  # no step was made yet
    (tmp_path / "metrics.jsonl").touch()
    assert workdir.changes(tmp_path, EXPERIMENT) == {}
    assert workdir.load_experiment(tmp_path) == EXPERIMENT
    other = dataclasses.replace(
        EXPERIMENT, optimizer=Optimizer(learning_rate=3e-4), data=Data(batch=4)
    )
    with pytest.raises(ConfigError) as caught:
        workdir.changes(tmp_path, other)
    text = str(caught.value)
    assert "2 fields differ (config.data.batch: 8 -> 4, " in text and "another --workdir" in text
    assert "config.optimizer.learning_rate: 0.001 -> 0.0003" in text and "\n" not in text


def test_fields_that_do_not_change_the_computation_may_change(tmp_path):
    workdir.write_run(tmp_path, EXPERIMENT, Bytes())
    (tmp_path / "metrics.jsonl").touch()
    other = dataclasses.replace(
        EXPERIMENT,
        train=Train(steps=2000, log_every=1, max_skipped=3),
        model=dataclasses.replace(EXPERIMENT.model, layers="unroll", remat="full"),
    )
    assert workdir.changes(tmp_path, other)["config.train.steps"] == (1000, 2000)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="thesis.tex"), workdir.locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_on_a_live_run_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use"), workdir.locked(tmp_path):
            pass
    with workdir.locked(tmp_path):
        with pytest.raises(ConfigError), workdir.locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # a refused start leaves the lock of the live run
    with workdir.locked(tmp_path):
        pass
