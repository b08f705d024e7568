"""Synthetic tasks: rows follow their definitions, and only a model that can answer does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import ConfigError
from memjax.data import Data, open_data
from memjax.data.streams import batches
from memjax.data.tasks import MQAR, TASKS, Copy, Needle, Parity, Permutations
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import LanguageModel, Model
from memjax.training.config import Optimizer, Train
from memjax.training.loop import train


def draw(task, length, count=50):
    return task.rows([np.random.SeedSequence((1, i)) for i in range(count)], length)


@pytest.mark.parametrize("kind", TASKS)
def test_symbols_are_in_the_vocabulary_and_something_is_asked(kind):
    task = TASKS[kind]()
    tokens, targets, weight = draw(task, 40)
    for array in (tokens, targets):
        assert array.min() >= 0 and array.max() < task.vocab_size
    assert (weight.sum(1) > 0).all() and set(np.unique(weight)) <= {0.0, 1.0}


@pytest.mark.parametrize("task", [MQAR(pairs=4, vocab=32), MQAR(pairs=4, vocab=64, writes=3)])
def test_mqar_asks_every_key_once_for_its_last_value(task):
    for tokens, targets, weight in zip(*draw(task, 64)):
        pairs = 2 * task.pairs * task.writes
        last = dict(zip(tokens[0:pairs:2].tolist(), tokens[1:pairs:2].tolist()))
        asked = np.flatnonzero(weight)
        assert len(last) == task.pairs and len(set(tokens[1:pairs:2])) == pairs // 2
        assert sorted(tokens[asked]) == sorted(last)
        assert all(last[tokens[i]] == targets[i] for i in asked)
        assert (asked >= pairs).all() and (asked % 2 == 0).all()
        rest = np.setdiff1d(np.arange(pairs, 64), asked)
        assert (tokens[rest] == 0).all()


def test_mqar_prefers_near_returns_as_its_power_says():
    _, _, near = draw(MQAR(pairs=2, vocab=32, power=0.01), 64, 400)
    _, _, flat = draw(MQAR(pairs=2, vocab=32, power=1.0), 64, 400)
    middle = lambda weight: np.average(np.arange(64), weights=weight.sum(0))  # noqa: E731
    assert middle(near) < middle(flat) - 5
    np.testing.assert_allclose(middle(flat), 4 + (64 - 4 - 2) / 2, atol=3)


def test_parity_and_permutations_follow_their_group():
    for bits, targets, _ in zip(*draw(Parity(), 30)):
        assert [sum(bits[: i + 1]) % 2 for i in range(30)] == targets.tolist()
    elements = list(itertools.permutations(range(3)))
    for symbols, targets, _ in zip(*draw(Permutations(size=3), 30)):
        things = [0, 1, 2]
        for symbol, target in zip(symbols, targets):
            things = [elements[symbol][thing] for thing in things]
            assert tuple(things) == elements[target]


def test_needle_and_copy_answers_stand_in_the_row():
    task = Needle(keys=8, values=8, noise=16)
    for tokens, targets, weight in zip(*draw(task, 25)):
        assert weight.tolist() == [0.0] * 24 + [1.0]
        first = tokens.tolist().index(0)
        assert tokens[first + 1] == tokens[-1] and tokens[first + 2] == targets[-1]
        assert (tokens == 0).sum() == 2
    for tokens, targets, weight in zip(*draw(Copy(alphabet=5), 21)):
        assert targets[weight == 1].tolist() == tokens[:10].tolist()
        assert tokens[10] == 0 and np.flatnonzero(weight).tolist() == list(range(10, 20))


def test_splits_rows_and_processes_draw_rows_of_their_own():
    config = Data(source="task", task=Copy(), sequence=12, batch=4)
    streams = {split: batches(config, open_data(config, split)) for split in ("train", "valid")}
    one, again, other = streams["train"][3], streams["train"][3], streams["valid"][3]
    np.testing.assert_array_equal(one["tokens_BT"], again["tokens_BT"])
    rows = [*one["tokens_BT"], *other["tokens_BT"], *streams["train"][4]["tokens_BT"]]
    assert len({row.tobytes() for row in rows}) == 12
    corpus = open_data(config, "train")
    halves = [batches(config, corpus, process=(i, 2))[3]["tokens_BT"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), one["tokens_BT"])
    assert one["reset_BT"][:, 0].all() and not one["reset_BT"][:, 1:].any()


def test_accuracy_counts_answers_and_whole_rows():
    lm = LanguageModel(Model(d_model=8, pattern=("lstm",), repeat=1), 2, rngs=nnx.Rngs(0))
    corpus = open_data(Data(source="task", task=Parity()), "test")
    got = evaluate_task(lm, corpus, length=6, rows=40, batch=8)
    batch = [corpus.batch(8 * i, np.arange(8), 6) for i in range(5)]
    rows = {k: jnp.concatenate([b[k] for b in batch]) for k in batch[0]}
    _, logits = lm(lm.init_state(40), rows["tokens_BT"], rows["reset_BT"])
    right = np.asarray(logits).argmax(-1) == rows["targets_BT"]
    nll = -np.asarray(jax.nn.log_softmax(logits))[
        np.arange(40)[:, None], np.arange(6), rows["targets_BT"]
    ]
    assert got["answers"] == 240 and got["rows"] == 40
    np.testing.assert_allclose(got["accuracy"], right.mean())
    np.testing.assert_allclose(got["row_accuracy"], right.all(1).mean())
    np.testing.assert_allclose(got["loss"], nll.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(source="task"), "task=None goes with source"),
        (dict(task=Parity()), 'goes with source="task" alone'),
        (dict(source="task", task=Parity(), tokenizer="bpe"), "tokenizer='bpe' is not used"),
        (dict(source="task", task=Parity(), path="x"), "path='x' is not read with source=task"),
    ],
)
def test_data_refuses_what_does_not_go_with_a_task(fields, message):
    with pytest.raises(ConfigError) as error:
        Data(**fields)
    assert message in str(error.value)


def test_rows_too_short_for_their_task_are_refused():
    config = Data(source="task", task=MQAR(pairs=8, vocab=64), sequence=16)
    with pytest.raises(ConfigError, match="data.sequence=16 is too short for task mqar; use at l"):
        batches(config, open_data(config, "train"))
    with pytest.raises(ConfigError, match="pairs=40 needs more symbols than vocab=64"):
        MQAR(pairs=40, vocab=64)


def test_an_lstm_learns_parity_in_a_run(tmp_path):
    experiment = Experiment(
        model=Model(d_model=32, pattern=("lstm",), repeat=1, mixers={"lstm": LSTM()}),
        data=Data(source="task", task=Parity(), sequence=16, batch=64),
        optimizer=Optimizer(learning_rate=1e-2, warmup=10),
        train=Train(steps=250, tensorboard=False, log_every=250),
    )
    summary = train(experiment, tmp_path / "run")
    assert summary["loss"] < 0.05
