"""An evaluation that is interrupted goes on, and finds to the last bit what one call finds."""

import json
import os
import signal

import jax
import pytest
from test_perplexity import make_corpus, make_lm

from memjax.cli import main
from memjax.data import Data
from memjax.errors import Stopped
from memjax.evals import partial, perplexity
from memjax.evals import run as runs
from memjax.evals.config import Eval
from memjax.experiment import Experiment
from memjax.model import split


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Stands for a checkpoint on disk: loading one is tested with the checkpoints."""
    corpus = make_corpus(tmp_path_factory.mktemp("texts"))
    folder = corpus.folder.parents[2]
    data = Data(source="text", path=str(folder / "text"), cache=str(folder / "cache"), sequence=8)
    experiment = Experiment(data=data, eval=Eval(batch=2))
    return runs.Run(experiment, split(make_lm()), corpus.tokenizer, 12)


@pytest.fixture
def batches(loaded, tmp_path, monkeypatch):
    """The batches of an evaluation; `interrupt` names those at which a signal comes."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(runs, "load_run", lambda workdir, step: loaded)
    make = perplexity.make_batches

    def watched(*arguments):
        for number, batch in enumerate(make(*arguments)):
            if number in watched.interrupt:
                watched.interrupt.remove(number)
                os.kill(os.getpid(), watched.signal)
            yield batch

    watched.interrupt, watched.signal = [], signal.SIGINT
    monkeypatch.setattr(perplexity, "make_batches", watched)
    return watched


def without_time(values):
    return {k: v for k, v in values.items() if k not in ("seconds", "tokens_per_s")}


@pytest.mark.parametrize(
    "settings", [{}, {"carry": False}, {"protocol": "sliding"}], ids=["stream", "zeroed", "sliding"]
)
def test_an_interrupted_evaluation_goes_on_and_finds_the_same(settings, batches, tmp_path, capfd):
    whole = runs.run_eval(tmp_path / "whole", **settings)
    batches.interrupt = [9, 21]
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        batches.signal = signum
        with pytest.raises(Stopped, match="run the same command to go on") as stopped:
            runs.run_eval(tmp_path / "parts", **settings)
        assert stopped.value.status == status
    (kept,) = (tmp_path / "parts" / "eval").iterdir()
    assert kept.suffix == ".part"
    capfd.readouterr()
    resumed = runs.run_eval(tmp_path / "parts", **settings)
    assert "going on from" in capfd.readouterr().err
    assert without_time(resumed) == without_time(whole)
    (result,) = (tmp_path / "parts" / "eval").iterdir()
    assert json.loads(result.read_text()) == resumed


def test_what_was_scored_with_other_weights_or_is_torn_is_not_used(
    batches, loaded, tmp_path, monkeypatch, capfd
):
    whole = runs.run_eval(tmp_path / "whole")
    batches.interrupt = [9]
    with pytest.raises(Stopped):
        runs.run_eval(tmp_path / "parts")
    (kept,) = (tmp_path / "parts" / "eval").iterdir()
    definition, params = loaded.parts
    moved = jax.tree.map(lambda p: p + 1e-3, params)
    other = loaded._replace(parts=(definition, moved))
    monkeypatch.setattr(runs, "load_run", lambda workdir, step: other)
    saved = kept.read_bytes()
    assert runs.run_eval(tmp_path / "parts")["nll_nats"] != whole["nll_nats"]
    monkeypatch.setattr(runs, "load_run", lambda workdir, step: loaded)
    for torn in (saved[: len(saved) // 2], b"", b"something else"):
        kept.write_bytes(torn)
        assert without_time(runs.run_eval(tmp_path / "parts")) == without_time(whole)
    assert "going on" not in capfd.readouterr().err


def test_a_crash_loses_no_more_than_the_time_between_saves(batches, tmp_path, monkeypatch):
    whole = runs.run_eval(tmp_path / "whole")
    monkeypatch.setattr(partial, "SAVE_EVERY_S", 0.0)
    score = perplexity._compiled

    def crashing(*arguments):
        init, real = score(*arguments)
        left = iter(range(9))

        def crash(*arrays):
            if next(left, None) is None:
                raise RuntimeError("the machine is gone")
            return real(*arrays)

        return init, crash

    monkeypatch.setattr(perplexity, "_compiled", crashing)
    with pytest.raises(RuntimeError):
        runs.run_eval(tmp_path / "parts")
    (kept,) = (tmp_path / "parts" / "eval").iterdir()
    monkeypatch.setattr(perplexity, "_compiled", score)
    assert without_time(runs.run_eval(tmp_path / "parts")) == without_time(whole)
    assert not kept.exists()


def test_the_command_says_how_far_it_came(batches, tmp_path, capfd):
    batches.interrupt = [9]
    assert main(["eval", f"--workdir={tmp_path}"]) == 130
    err = capfd.readouterr().err
    assert "stopping: saves after this batch" in err
    assert "SIGINT: scored" in err and "run the same command to go on" in err
    assert main(["eval", f"--workdir={tmp_path}", "--max-documents=2"]) == 0
    out = capfd.readouterr().out
    assert "note: only the start of the split was scored" in out
