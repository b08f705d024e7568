"""Two hundred points, one of them broken: stopped in the middle, finished, reported."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from test_sweeps_run import SWEEP

from memjax.cli import main
from memjax.sweeps.directory import Directory

pytestmark = pytest.mark.slow
COUNT = 200
MANY = """

def get_sweep():
    rates = {f"r{n:03d}": 1e-3 * (1 + n / 100) for n in range(199)} | {"broken": 1e30}
    return Sweep(base=BASE, points=axis("optimizer.learning_rate", rates))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index}.txt").write_text(f"text number {index} of the corpus. " * (6 + index))
    (tmp_path / "sweep.py").write_text(SWEEP.format(texts=str(texts)) + MANY)
    monkeypatch.setenv("MEMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "sweep.py"


def on_a_terminal(command, until=None):
    """Run a command on a terminal; SIGTERM once `until()`. Its status and what it drew."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    os.set_blocking(leader, False)
    drawn, stopped = b"", False
    while process.poll() is None:
        try:
            drawn += os.read(leader, 1 << 16)
        except (BlockingIOError, OSError):
            time.sleep(0.05)
        if until is not None and not stopped and until():
            process.send_signal(signal.SIGTERM)
            stopped = True
    os.close(leader)
    return process.returncode, drawn.decode(errors="replace")


def test_two_hundred_points_are_finished_each_once_and_a_broken_one_harms_no_other(file, tmp_path):
    directory = Directory(tmp_path / "many")
    command = [sys.executable, "-m", "memjax", "sweep", f"--sweep={file}"]
    command.append(f"--workdir={directory.path}")

    def done():
        return [p for p in directory.path.glob("status/*.json") if '"done"' in p.read_text()]

    status, drawn = on_a_terminal(command, until=lambda: len(done()) > COUNT // 3)
    assert status == 75
    assert "running" in drawn and re.search(r"\d+ done, 1 running, \d+ waiting of 200", drawn)
    finished = {path.stem: path.stat().st_mtime_ns for path in done()}
    before = {
        path: path.stat().st_mtime_ns
        for name in finished
        for path in directory.run(name).rglob("*")
    }
    assert COUNT // 3 <= len(finished) < COUNT - 1
    status, drawn = on_a_terminal(command)
    assert status == 1 and f"{len(finished)} of 200 points are done already" in drawn
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    states = {name: directory.status(name) for name in directory.names()}
    broken = states.pop("learning_rate=broken")
    assert broken["state"] == "failed" and "max_skipped=2" in broken["error"]
    assert len(states) == COUNT - 1 and {s["state"] for s in states.values()} == {"done"}
    assert sorted(s["attempts"] for s in states.values())[:-1] == [1] * (COUNT - 2)
    for name in states:
        assert [record["step"] for record in directory.records(name)] == [2, 4, 6, 8]
    assert main(["report", str(directory.path)]) == 0
    page = (directory.path / "report" / "report.html").read_text()
    assert page.count("<tr>") == COUNT + 1 and "max_skipped=2" in page
