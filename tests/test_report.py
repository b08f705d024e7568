"""Reports: what they show is what the runs recorded; one file; right for one run and for many."""

import base64
import html.parser
import json
import math
import random
import re

import pytest

from memjax.cli import main
from memjax.config import to_dict
from memjax.experiment import Experiment
from memjax.report.collect import collect

CONFIG = to_dict(Experiment())


def make_run(folder, seed, width=64, steps=100, planned=100, evaluated=True):
    """A run as training leaves it, with losses of its own."""
    rng, records = random.Random(seed), []
    (folder / "eval").mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["model"]["d_model"], config["train"]["seed"] = width, seed
    config["train"]["steps"] = planned
    (folder / "config.json").write_text(json.dumps(config))
    for step in range(10, steps + 1, 10):
        record = {
            "step": step,
            "loss": 2 + 3 * math.exp(-step / 30) + rng.random(),
            "tokens": 1000 * step,
            "tokens_per_s": 2000.0,
            "seconds": step,  # half of the time was not training
        }
        if step % 50 == 0:
            record["eval_loss"] = 2.0 + rng.random()
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if evaluated:
        result = {"task": "pg19", "split": "test", "protocol": "stream", "context": 64}
        result |= {"carry": True, "word_perplexity": 50 + seed, "bits_per_byte": 1.5, "step": steps}
        (folder / "eval" / "a.json").write_text(json.dumps(result))
    return records


def make_sweep(folder, count, failed=()):
    points = []
    for n in range(count):
        width, seed = (64, 128)[n % 2], n // 2
        name = f"d_model={width},seed={seed}"
        make_run(folder / "runs" / name, n, width)
        for part in ("status", "logs", "configs"):
            (folder / part).mkdir(exist_ok=True)
        state = (
            {"state": "failed", "error": "it <b>broke</b>"} if n in failed else {"state": "done"}
        )
        status = json.dumps({**state, "attempts": 1, "seconds": 200.0})
        (folder / "status" / f"{name}.json").write_text(status)
        (folder / "logs" / f"{name}.log").write_text("before\nthe last words & more\n")
        labels = {"d_model": str(width), "seed": str(seed)}
        point = {"name": name, "digest": str(n), "labels": labels, "matched": {}}
        points.append({**point, "params": 1000 * width, "state_bytes": 4 * width})
    plan = {"sweep": "x", "settings": {}, "points": points}
    (folder / "sweep.json").write_text(json.dumps(plan))


class Page(html.parser.HTMLParser):
    """The tables of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.cell, self.opened = [], [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loads += [values[k] for k in ("src", "href", "xlink:href") if k in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = [values.get("data-v"), ""]
        self.opened.append(tag)

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            full, shown = self.cell
            self.tables[-1][-1].append(shown if full is None else float(full))
            self.cell = None

    def table(self, index):
        head, *rows = self.tables[index]
        return [dict(zip(head, row)) for row in rows]


def report(folder, *arguments):
    assert main(["report", str(folder), *arguments]) == 0
    text = (folder / "report" / "report.html").read_text()
    return text, Page(text)


def test_a_report_shows_what_the_runs_recorded(tmp_path):
    a = make_run(tmp_path / "a", 1, width=64)
    b = make_run(tmp_path / "b", 2, width=128, planned=500)
    text, page = report(tmp_path)
    (rows,) = [page.table(i) for i in range(len(page.tables))]
    by_name = {row["run"]: row for row in rows}
    for name, records, width, seed in (("a", a, 64, 1), ("b", b, 128, 2)):
        row = by_name[name]
        assert row["loss"] == records[-1]["loss"]
        assert row["valid loss"] == records[-1]["eval_loss"]
        assert (row["model.d_model"], row["train.seed"]) == (width, seed)
        assert row["word ppl"] == 50 + seed
        assert row["tokens/s"] == 2000.0 and row["goodput"] == 0.5
    assert (by_name["a"]["state"], by_name["b"]["state"]) == ("done", "stopped")
    best = min((a, b), key=lambda records: records[-1]["eval_loss"])
    assert f"best loss</dt><dd>{best[-1]['eval_loss']:.4f}" in text
    assert "goodput</dt><dd>50%" in text
    assert "<p>Evaluated: pg19, test, stream, context 64, state carried</p>" in text
    assert "running mean over 2 records" in text  # of ten


def test_the_page_needs_no_other_file_and_its_figures_are_beside_it(tmp_path):
    make_run(tmp_path / "a", 1)
    make_run(tmp_path / "b", 2)
    text, page = report(tmp_path)
    assert all(x.startswith(("data:", "#")) for x in page.loads), page.loads
    assert not re.search(r"@import|url\((?!['\"]?(#|data:))", text)
    names = {p.name for p in (tmp_path / "report").iterdir()}
    assert names == {"report.html", "curve-loss.png", "curve-eval_loss.png"}
    for path in (tmp_path / "report").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_seeds_are_put_together_and_failures_are_told(tmp_path):
    make_sweep(tmp_path / "s", 6, failed=(5,))
    text, page = report(tmp_path / "s", "--title=Width & seed")
    settings, runs = page.table(0), page.table(1)
    assert [row["seeds"] for row in settings] == [3, 3] and len(runs) == 6
    for row in settings:
        same = [r["loss"] for r in runs if r["d_model"] == row["d_model"]]
        mean = sum(same) / 3
        deviation = math.sqrt(sum((x - mean) ** 2 for x in same) / 2)
        assert row["loss"] == pytest.approx(mean) and row["± loss"] == pytest.approx(deviation)
    assert "<title>Width &amp; seed</title>" in text
    assert 'failed</dt><dd><a href="#failures">1' in text and "<h2 id=failures>" in text
    assert "it &lt;b&gt;broke&lt;/b&gt;" in text and "the last words &amp; more" in text


def test_evaluations_are_told_apart_by_what_differs_and_tasks_show_accuracy(tmp_path):
    make_run(tmp_path / "a", 1)
    kept = {"task": "pg19", "split": "test", "protocol": "stream", "context": 64, "step": 100}
    zeroed = {**kept, "carry": False, "word_perplexity": 70.0, "bits_per_byte": 1.7}
    (tmp_path / "a" / "eval" / "b.json").write_text(json.dumps(zeroed))
    _, page = report(tmp_path)
    (row,) = page.table(0)
    assert row["state carried: word ppl"] == 51 and row["state zeroed: word ppl"] == 70
    make_run(tmp_path / "b", 2, evaluated=False)
    recall = {"task": "mqar", "split": "test", "context": 256, "accuracy": 0.75, "step": 100}
    (tmp_path / "b" / "eval" / "a.json").write_text(json.dumps(recall))
    _, page = report(tmp_path)
    by_name = {row["run"]: row for row in page.table(1)}
    assert by_name["b"]["mqar, context 256: accuracy"] == 0.75
    assert by_name["a"]["pg19, stream, context 64, state zeroed: word ppl"] == 70


def test_one_run_and_a_run_without_records_make_a_report(tmp_path):
    make_run(tmp_path / "a", 1, evaluated=False)
    _, page = report(tmp_path / "a")
    assert [row["run"] for row in page.table(0)] == ["a"]
    make_run(tmp_path / "b", 1, steps=0)
    _, page = report(tmp_path / "b")
    assert page.table(0)[0]["state"] == "waiting"


def test_many_runs_are_drawn_as_pictures_and_all_listed(tmp_path):
    make_sweep(tmp_path, 60)
    text, page = report(tmp_path)
    assert len(page.table(1)) == 60 and page.opened.count("img") >= 1
    data = re.search(r"data:image/png;base64,([^\"]+)", text)
    assert base64.b64decode(data[1])[:4] == b"\x89PNG"


def test_runs_within_folders_are_found_and_a_damaged_one_is_named(tmp_path):
    make_run(tmp_path / "x" / "a", 1)
    make_run(tmp_path / "y" / "b", 2)
    (tmp_path / "y" / "b" / "config.json").write_text("{")
    runs = {run.name: run for run in collect(tmp_path)}
    assert set(runs) == {"x/a", "y/b"}
    assert runs["y/b"].state == "failed" and "config.json" in runs["y/b"].error


@pytest.mark.parametrize(("name", "part"), [("nowhere", "no such folder"), ("empty", "no run")])
def test_nothing_to_report_is_one_line(name, part, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / name)]) == 2
    err = capfd.readouterr().err
    assert part in err and len(err.strip().splitlines()) == 1
