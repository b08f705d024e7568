"""A run from its folder: what it leaves, how it ends, how it goes on."""

import dataclasses
import json
import random
import shutil
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from memjax.config import ConfigError
from memjax.data import Data
from memjax.evals.config import Eval
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import Model
from memjax.training import loop
from memjax.training.config import Checkpoint, Optimizer, Train
from memjax.training.errors import Diverged, Interrupted
from memjax.training.loop import train
from memjax.training.metrics import read_records


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(tmp_path_factory):
    """The runs of these tests compile the same programs: once is enough."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    texts, chosen = tmp_path_factory.mktemp("texts"), random.Random(0)
    for index in range(12):
        text = "".join(chosen.choices("abcdefgh \n", k=chosen.randint(150, 700)))
        (texts / f"{index}.txt").write_text(text)
    model = Model(d_model=8, pattern=("lstm",), repeat=1, mixers={"lstm": LSTM(unroll=1)}, mlp=None)
    data = Data(source="text", path=str(texts), sequence=8, batch=2, threads=0)
    return Experiment(
        model=model,
        data=dataclasses.replace(data, cache=str(tmp_path_factory.mktemp("tokens"))),
        optimizer=Optimizer(warmup=2, schedule="constant"),
        train=Train(steps=6, log_every=4, tensorboard=False),
        checkpoint=Checkpoint(every=4, keep=1),
        eval=Eval(every=3, tokens=32),
    )


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return train(experiment, workdir), workdir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


def with_train(experiment, **fields):
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **fields))


def test_a_run_leaves_its_records(finished):
    summary, workdir = finished
    records = read_records(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 4, 6]
    assert ["eval_loss" in record for record in records] == [True, False, True]
    expected = {"step", "loss", "tokens", "tokens_per_s", "learning_rate", "grad_norm"}
    assert expected <= records[-1].keys()
    assert summary["step"] == 6 and not summary["already_finished"]
    assert summary["loss"] == records[-1]["loss"] and summary["tokens"] == records[-1]["tokens"]
    assert 0 < summary["tokens"] <= 6 * 2 * 8


def test_a_finished_run_says_so_and_does_nothing(finished, experiment, capsys):
    summary, workdir = finished
    files = sorted(path for path in workdir.rglob("*"))
    before = (workdir / "metrics.jsonl").read_text()
    again = train(experiment, workdir)
    assert again["already_finished"] and again["loss"] == summary["loss"]
    assert "is finished" in capsys.readouterr().err
    assert files == sorted(path for path in workdir.rglob("*"))
    assert before == (workdir / "metrics.jsonl").read_text()


def test_more_steps_extend_a_run_as_if_they_had_been_asked_for_at_once(
    copy, experiment, tmp_path, capsys
):
    longer = with_train(experiment, steps=8)
    train(longer, copy)
    assert "config.train.steps: 6 -> 8" in capsys.readouterr().err
    train(longer, tmp_path / "once")
    extended, once = (read_records(d / "metrics.jsonl")[-1] for d in (copy, tmp_path / "once"))
    assert extended["step"] == once["step"] == 8
    assert extended["loss"] == once["loss"] and extended["tokens"] == once["tokens"]


def test_another_config_is_refused_before_anything_is_written(copy, experiment):
    before = (copy / "config.json").read_text()
    with pytest.raises(ConfigError, match="config.train.seed: 0 -> 1"):
        train(with_train(experiment, seed=1, steps=9), copy)
    assert (copy / "config.json").read_text() == before


def test_changed_data_are_refused(copy, experiment, tmp_path):
    path = copy / "config.json"
    texts = shutil.copytree(experiment.data.path, tmp_path / "texts")
    other = dataclasses.replace(experiment.data, path=str(texts))
    path.write_text(path.read_text().replace(experiment.data.path, str(texts)))
    longer = with_train(dataclasses.replace(experiment, data=other), steps=8)
    for text in texts.iterdir():
        text.write_text("changed " * 40)
    with pytest.raises(ConfigError, match="the data changed since the run"):
        train(longer, copy)


def test_divergence_ends_the_run_with_one_line_and_saves_nothing_of_it(experiment, tmp_path):
    bad = dataclasses.replace(
        experiment,
        optimizer=Optimizer(learning_rate=1e30, warmup=0, schedule="constant", weight_decay=0.0),
        train=dataclasses.replace(experiment.train, steps=40, max_skipped=3, z_loss=1.0),
    )
    with pytest.raises(Diverged) as caught:
        train(bad, tmp_path / "run")
    text = str(caught.value)
    assert "max_skipped=3" in text and "none was saved" in text and "\n" not in text
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    json.loads((tmp_path / "run" / "config.json").read_text())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_at_hand(experiment, tmp_path, monkeypatch, capfd, number, status):
    steps, put, before = [], loop.put_batch, signal.getsignal(number)

    def put_and_signal(batch, mesh):
        steps.append(len(steps))
        if len(steps) == 2:
            signal.raise_signal(number)
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_signal)
    with pytest.raises(Interrupted) as caught:
        train(experiment, tmp_path / "run")
    assert caught.value.status == status and caught.value.step == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert signal.getsignal(number) is before
    assert "saves after this step" in capfd.readouterr().err


def test_an_error_in_the_loop_saves_the_last_good_step_first(experiment, tmp_path, monkeypatch):
    steps, put = [], loop.put_batch

    def fail(batch, mesh):
        steps.append(len(steps))
        if len(steps) == 3:
            raise RuntimeError("the machine is on fire")
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        train(experiment, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
