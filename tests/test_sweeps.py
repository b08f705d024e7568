"""Sweeps before anything runs: points, names, checks, costs, stopping rules."""

import dataclasses
import itertools
import random
import statistics
from pathlib import Path

import pytest

from memjax.config import ConfigError, to_dict
from memjax.describe import describe
from memjax.experiment import Experiment
from memjax.mixers import LSTM, LinearAttention
from memjax.model import Model
from memjax.sweeps import (
    Choice,
    Halving,
    Match,
    Median,
    Point,
    Sweep,
    Uniform,
    axis,
    chain,
    draw,
    load_sweep,
    product,
    sample,
    seeds,
    when,
    zipped,
)
from memjax.sweeps.directory import Directory
from memjax.sweeps.plan import Planner
from memjax.training.config import Train

BASE = Experiment(
    model=Model(d_model=16, pattern=("lstm",), repeat=1, mixers={"lstm": LSTM()}),
    train=Train(steps=7),
)
WIDTHS, RATES = (16, 32, 48), (1e-3, 3e-3)


def changes(space):
    return [dict(point.changes) for point in space]


def plan(points, overrides=(), **fields):
    sweep = Sweep(base=BASE, points=points, **fields)
    return Planner(sweep, overrides).plan(sweep.points)


def test_a_product_has_every_combination_in_order():
    space = product(
        axis("model.d_model", *WIDTHS), axis("optimizer.learning_rate", *RATES), seeds(2)
    )
    expected = [
        {
            "model.d_model": width,
            "optimizer.learning_rate": rate,
            "train.seed": seed,
            "data.seed": seed,
        }
        for width, rate, seed in itertools.product(WIDTHS, RATES, range(2))
    ]
    assert changes(space) == expected


def test_zipped_axes_go_together_and_chained_spaces_follow_one_another():
    pairs = zipped(axis("model.d_model", 16, 32), axis("optimizer.learning_rate", *RATES))
    assert changes(pairs) == [
        {"model.d_model": w, "optimizer.learning_rate": r} for w, r in zip((16, 32), RATES)
    ]
    assert changes(chain(pairs, seeds(1))) == [*changes(pairs), {"train.seed": 0, "data.seed": 0}]


def test_a_conditional_axis_multiplies_only_the_points_that_meet_its_condition():
    space = when(axis("model.d_model", 16, 32), {"model.d_model": 32}, axis("train.steps", 1, 2))
    assert changes(space) == [
        {"model.d_model": 16},
        {"model.d_model": 32, "train.steps": 1},
        {"model.d_model": 32, "train.steps": 2},
    ]
    by_function = when(
        axis("model.d_model", 16, 32), lambda c: c["model.d_model"] > 16, axis("train.steps", 1, 2)
    )
    assert by_function == space


def test_a_sample_is_part_of_its_space_and_random_points_stay_when_more_are_asked_for():
    space = product(axis("model.d_model", *range(16, 116)), seeds(3))
    some = sample(space, 20, seed=1)
    assert len(set(map(space.index, some))) == 20
    assert [space.index(p) for p in some] == sorted(space.index(p) for p in some)
    fields = {
        "optimizer.learning_rate": Uniform(low=1e-5, high=1e-1, log=True),
        "model.d_model": Uniform(low=16, high=64, whole=True),
        "train.steps": Choice((1, 5)),
    }
    few, many = draw(50, fields), draw(200, fields)
    assert changes(many[:50]) == changes(few)
    rates = [p.changes["optimizer.learning_rate"] for p in many]
    assert all(1e-5 <= r <= 1e-1 for r in rates)
    assert 2e-4 < statistics.median(rates) < 5e-3  # even odds of each factor, not of each number
    assert {p.changes["train.steps"] for p in many} == {1, 5}
    widths = [p.changes["model.d_model"] for p in many]
    assert all(isinstance(w, int) and 16 <= w <= 64 for w in widths)


def test_names_say_what_the_axes_say_and_stay_when_values_are_added():
    few = plan(product(axis("model.d_model", 16, 32), seeds(2)))
    more = plan(product(axis("model.d_model", 16, 24, 32), seeds(3)))
    assert [p.name for p in few] == [f"d_model={w},seed={s}" for w in (16, 32) for s in (0, 1)]
    assert {p.name: p.digest for p in few}.items() <= {p.name: p.digest for p in more}.items()


def test_named_values_and_whole_parts_of_a_config_are_points_too():
    models = {
        "lstm": BASE.model,
        "linear": Model(d_model=16, pattern=("linear_attention",), repeat=1),
    }
    lstm, linear = plan(axis("model", models))
    assert (lstm.name, linear.name) == ("model=lstm", "model=linear")
    assert lstm.experiment.model == BASE.model
    assert linear.experiment.model.pattern == ("linear_attention",)


def test_points_may_start_from_different_config_files(tmp_path):
    file = tmp_path / "other.py"
    file.write_text(
        "from memjax.experiment import Experiment\nfrom memjax.model import Model\n"
        "def get_config(kind='lstm'):\n"
        "    return Experiment(model=Model(d_model=32, pattern=(kind,), repeat=1))\n"
    )
    points = product(axis("config", f"{file}:lstm", f"{file}:linear_attention"), seeds(1))
    made = plan(points, overrides=[("train.steps", "3")])
    assert [p.name for p in made] == ["config=lstm,seed=0", "config=linear_attention,seed=0"]
    assert [p.experiment.model.pattern[0] for p in made] == ["lstm", "linear_attention"]
    assert all(p.experiment.train.steps == 3 for p in made)


def test_equal_configs_run_once():
    assert len(plan(chain(axis("model.d_model", 16, 32), axis("train.steps", 7)))) == 2


def test_labels_that_only_look_alike_get_names_that_differ():
    names = [p.name for p in plan(axis("optimizer.learning_rate", {"a/b": 1e-3, "a:b": 2e-3}))]
    assert len(set(names)) == 2 and all("/" not in name for name in names)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: plan(axis("model.d_modle", 16)), ["d_modle=16", "did you mean d_model?"]),
        (lambda: plan(axis("model.d_model", 16, "wide")), ["d_model=wide", "an integer"]),
        (lambda: plan(axis("train.steps", 5, 0)), ["steps=0", "at least 1"]),
        (lambda: plan(axis("model.d_model", 8), [("model.d_model", "4")]), ["--config.model.d_mo"]),
        (lambda: product(axis("a.x", 1), axis("a.x", 2)), ["two axes set a.x"]),
        (lambda: product(axis("a.x", 1), axis("b.x", 2)), ["'x'", "name="]),
        (lambda: axis("a.x"), ["a.x", "no values"]),
        (lambda: axis("a.x", 1, 1), ["twice"]),
        (lambda: zipped(axis("a.x", 1), axis("b.y", 1, 2)), ["[1, 2]"]),
        (lambda: sample(seeds(2), 3), ["3", "2 points"]),
        (lambda: seeds(0), ["seeds(0)"]),
        (lambda: Uniform(low=0, high=1, log=True), ["0 < low"]),
        (lambda: Sweep(base=BASE, points=()), ["at least one"]),
        (lambda: Sweep(base=BASE, retries=-1), ["retries=-1"]),
        (lambda: Match(by="params", tolerance=2.0), ["tolerance=2.0"]),
        (lambda: Match(change=("data.sequence",)), ["data.sequence", "model"]),
        (lambda: Halving(factor=1), ["factor=1"]),
        (lambda: load_sweep("nowhere.py"), ["nowhere.py"]),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_that_names_it(make, parts):
    with pytest.raises(ConfigError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_a_sweep_file_without_a_sweep_is_refused_by_name(tmp_path):
    for text, part in [
        ("x = 1", "get_sweep"),
        ("def get_sweep(): return 3", "must return"),
        ("def get_sweep(): raise KeyError('lost')", "KeyError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def get_sweep(:", "SyntaxError"),
    ]:
        (tmp_path / "s.py").write_text(text)
        with pytest.raises(ConfigError, match=part):
            load_sweep(str(tmp_path / "s.py"))


def test_costs_are_those_of_describe():
    (point,) = plan((Point(),))
    told = describe(BASE, 257)
    costs = point.costs
    assert costs.params == told["params"]
    assert costs.state_bytes == told["state_bytes_per_sequence"]
    assert costs.tokens == 7 * told["tokens_per_step"]
    assert costs.flops == 7 * told["tokens_per_step"] * told["flops_per_token"]


def test_matched_points_agree_within_one_per_cent_and_say_what_changed():
    linear_model = Model(
        d_model=64,
        pattern=("linear_attention",),
        repeat=2,
        mixers={"linear_attention": LinearAttention(heads=2)},
    )
    lstm_model = dataclasses.replace(BASE.model, d_model=96)
    models = {"lstm": lstm_model, "linear": linear_model}
    lstm, linear = plan(axis("model", models), match=Match(by="params"))
    assert lstm.matched == {} and lstm.experiment.model == lstm_model
    told = describe(linear.experiment, 257)["params"]
    assert abs(told - lstm.costs.params) <= 0.01 * lstm.costs.params
    assert linear.matched["model.d_model"] == (64, linear.experiment.model.d_model)
    assert {"model.d_model", "model.mlp.ratio"} >= linear.matched.keys()


def test_a_point_keeps_its_run_when_its_name_changes(tmp_path):
    directory = Directory(tmp_path / "sweep")
    before = plan(axis("model.d_model", 16, 32))
    directory.write(before, "s.py", {})
    renamed = directory.adopt(plan(axis("model.d_model", 16, 48, 32, name="width")))
    assert [p.name for p in renamed] == ["d_model=16", "width=48", "d_model=32"]


def test_a_name_never_stands_for_two_configs(tmp_path):
    directory = Directory(tmp_path / "sweep")
    directory.write(plan(axis("model.d_model", {"a": 16, "b": 32})), "s.py", {})
    swapped = directory.adopt(plan(axis("model.d_model", {"a": 32, "b": 48})))
    assert len({p.name for p in swapped}) == 2
    assert swapped[0].name == "d_model=b"  # the config that was b before


def test_a_run_that_began_with_another_config_is_refused_before_anything_starts(tmp_path):
    directory = Directory(tmp_path / "sweep")
    (point,) = plan(axis("model.d_model", 16))
    directory.write([point], "s.py", {})
    run = directory.run(point.name)
    run.mkdir(parents=True)
    (run / "config.json").write_text(directory.config(point.name).read_text())
    (run / "metrics.jsonl").write_text("")
    assert directory.adopt([point]) == [point]
    other = Planner(Sweep(base=BASE, points=axis("model.d_model", 16)), [("model.repeat", "2")])
    with pytest.raises(ConfigError, match=r"sweep point d_model=16: .*config.model.repeat: 1 -> 2"):
        directory.adopt(other.plan(axis("model.d_model", 16)))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.txt"), Directory(tmp_path).locked():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    one, two = Directory(tmp_path / "sweep"), Directory(tmp_path / "sweep")
    with one.locked(), pytest.raises(ConfigError, match="in progress"), two.locked():
        pass
    with two.locked():
        pass


def test_the_median_rule_ends_what_is_worse_than_the_middle_of_the_others():
    curves = {
        "good": [(10, 3.0), (20, 2.0)],
        "fair": [(10, 3.2), (20, 2.4)],
        "poor": [(10, 4.0), (20, 3.8)],
        "late": [(10, 2.5)],
        "new": [],
    }
    rule = Median(least=2)
    # means of the others up to step 20: good 2.5, fair 2.8; their median is 2.65
    assert rule.ends(curves, "poor")
    assert not rule.ends(curves, "good") and not rule.ends(curves, "late")
    assert not rule.ends(curves, "new")
    ahead = {**curves, "poor": [(10, 4.0), (20, 3.8), (30, 1.0)]}
    assert rule.ends(ahead, "poor")  # compared where the others are
    assert not Median(least=4).ends(curves, "poor")
    assert not Median(least=4, start=15).ends(curves, "poor")
    assert Median(least=3).ends(curves, "poor")
    assert not Median(least=2, start=21).ends(curves, "poor")


def test_successive_halving_keeps_the_best_of_those_that_reached_the_rung():
    rng, factor, first = random.Random(0), 3, 4
    ends = {name: rng.randint(0, 40) for name in "abcdefghijkl"}
    curves = {n: [(s, rng.random()) for s in range(1, end + 1)] for n, end in ends.items()}
    rule = Halving(first=first, factor=factor)
    for name, end in ends.items():
        shared = [r for r in (4, 12, 36) if sum(e >= r for e in ends.values()) >= factor]
        rungs = [r for r in shared if r <= end]
        expected = False
        if rungs:
            values = sorted(curves[n][rungs[-1] - 1][1] for n in ends if ends[n] >= rungs[-1])
            expected = curves[name][rungs[-1] - 1][1] not in values[: len(values) // factor]
        assert rule.ends(curves, name) == expected, name
    assert {rule.ends(curves, name) for name in ends} == {True, False}
    # One that ran far ahead before anybody looked is held against the others where they are.
    curves = {"good": [(4, 1.0), (8, 0.9)], "fair": [(4, 2.0), (8, 1.9)]}
    assert rule.ends(curves | {"poor": [(s, 3.0) for s in range(1, 500)]}, "poor")
    assert not rule.ends(curves | {"best": [(s, 0.5) for s in range(1, 500)]}, "best")


def test_the_base_of_a_sweep_is_left_as_it_was():
    before = to_dict(BASE)
    plan(product(axis("model.d_model", 16, 32), seeds(2)), overrides=[("train.steps", "9")])
    assert to_dict(BASE) == before


def test_every_sweep_of_the_experiments_can_be_planned():
    for file in sorted((Path(__file__).parent.parent / "experiments").rglob("sweep.py")):
        assert load_sweep(str(file)).points
