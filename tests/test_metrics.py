"""Records of a run."""

import json
import math
import time

import pytest

from memjax.config import ConfigError
from memjax.training.clock import Clock
from memjax.training.metrics import JsonLines, check_wandb, read_records


def write(path, step, *steps, **more):
    lines = JsonLines(path, step)
    for s in steps:
        lines.write({"step": s, "loss": 1.0 / s} | more)
    lines.close()


def test_going_on_drops_the_lines_of_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 3, 4)
    write(path, 2, 3, 4, 5)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    write(path, 2, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_line_is_on_the_disk_before_the_file_is_closed(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": 0.1})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]
    lines.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_line_is_strict_json(tmp_path, value):
    write(tmp_path / "m", 0, 1, eval_loss=value)

    def refuse(name):
        raise AssertionError(name)

    record = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": 1.0, "eval_loss": None}


def test_speed_leaves_out_pauses_and_the_first_step():
    clock = Clock(tokens=500)
    time.sleep(0.2)  # compiling
    clock.step(100)
    with clock.paused("saving"):
        time.sleep(0.3)
    time.sleep(0.05)
    clock.step(100)
    assert clock.tokens == 700
    assert 100 / 0.2 < clock.rate() <= 100 / 0.05
    assert clock.seconds() >= 0.55


def test_wandb_without_its_package_is_refused_and_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"config.train.wandb='p' needs .* memjax\[wandb\]"):
        check_wandb("p")
    check_wandb(None)
