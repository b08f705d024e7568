"""What someone meets first: help, a bare command, narrow terminals, pipes, completion."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memjax.cli import main
from memjax.commands import COMMANDS
from memjax.completion import field_paths
from memjax.experiment import Experiment
from memjax.tables import size
from memjax.training import loop

ROOT = Path(__file__).parent.parent


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_eighty_columns_and_leads_on(command, narrow, capsys):
    try:
        assert main([command, "--help"] if command else []) == 0
    except SystemExit as done:  # how argparse ends after help
        assert done.code == 0
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if len(line) > 80]
    if command:
        assert COMMANDS[command].summary in " ".join(out.split())
    else:
        assert all(name in out for name in COMMANDS)


def test_a_description_fits_eighty_columns_whole(narrow, capsys):
    assert main(["describe", f"--config={ROOT / 'configs' / 'quickstart.py'}"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    assert "0-3" in out and "gated_deltanet" in out  # four layers alike, one row


def test_a_description_shows_the_state_of_a_memory_beside_that_of_its_layers(narrow, capsys):
    config = f"--config={ROOT / 'configs' / 'lm2_tiny.py'}"
    assert main(["describe", config]) == 0
    out = capsys.readouterr().out
    assert main(["describe", config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    layers = told["layers"]
    counted = sum(layer["state_bytes"] + layer["memory_state_bytes"] for layer in layers)
    assert 0 < counted <= told["state_bytes_per_sequence"]
    (head,) = [line.split() for line in out.splitlines() if line.startswith("layer ")]
    assert "memory" in head and size(layers[0]["memory_state_bytes"]) in out


@pytest.mark.parametrize("columns", [None, "60"], ids=["pipe", "narrow"])
def test_names_of_runs_are_never_cut(columns, tmp_path, monkeypatch, capsys):
    name = "seed=0,backbone=" + "gated_deltanet_with_memory" * 3
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.json").write_text('{"train": {"steps": 5}}')
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["list", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out
    lines = [line.split()[0] for line in out.splitlines()[2:] if line.split()]
    assert "".join(lines) == f"runs/{name}"
    assert columns is None or max(map(len, out.splitlines())) <= int(columns)


def test_train_without_arguments_says_what_it_trains_and_where(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(loop, "train", lambda *given: asked.append(given) or {})
    assert main(["train"]) == 0
    ((experiment, workdir, _),) = asked
    assert experiment == Experiment() and workdir == "runs/default"
    out, err = capsys.readouterr()
    assert "training the defaults" in err and "runs/default" in err and "Ctrl-C" in err
    assert "memjax eval --workdir=runs/default" in out


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m memjax train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


LOST = """
import signal, sys, time
from memjax import cli
from memjax.commands.base import Command

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Python ignores what a finaliser raises

def command(arguments, rest):
    Dying()
    time.sleep(60)

cli.COMMANDS["list"] = Command("waits", lambda parser: None, command)
sys.argv = ["memjax", "list"]
cli.entry()
"""


def test_ctrl_c_is_not_lost_and_is_one_line():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "memjax: interrupted\n")
    assert time.monotonic() - start < 50


def test_field_paths_are_those_of_the_config_and_of_every_mixer():
    paths = field_paths(Experiment)
    assert len(paths) == len(set(paths))
    assert {"train.steps", "model.d_model", "model.mlp.ratio", "mesh.data"} <= set(paths)
    assert {"model.mixers.lstm.unroll", "model.mixers.attention.window"} <= set(paths)
    assert "model.mlp.kind" in paths and "model.mlp" not in paths


COMPLETED = {
    "memjax tr": ["train"],
    "memjax train --work": ["--workdir="],
    "memjax train --config.train.ste": ["--config.train.steps="],
    "memjax eval --split=t": ["train", "test"],
    "memjax sweep --slurm.part": ["--slurm.partition="],
    "memjax completion ba": ["bash"],
    "memjax train --config=configs/quickst": ["configs/quickstart.py"],
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_fields_choices_and_files(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "memjax.bash"
    script.write_text(capsys.readouterr().out)
    lines = [f"source {script}"]
    for typed in COMPLETED:
        lines += [f'COMP_LINE="{typed}"', "COMP_POINT=${#COMP_LINE}", "COMPREPLY=()", "_memjax"]
        lines.append('echo "${COMPREPLY[*]}"')
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert [line.split() for line in done.stdout.splitlines()] == list(COMPLETED.values())


SHELLS = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_in_a_real_shell(shell, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "HOME": str(tmp_path), "PS1": "> "}
    process = subprocess.Popen(
        SHELLS[shell], stdin=follower, stdout=follower, stderr=follower, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    os.set_blocking(leader, False)

    def appears(text, seconds=30):
        seen, end = "", time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            try:
                seen += os.read(leader, 1 << 16).decode(errors="replace").replace("\a", "")
            except BlockingIOError:
                time.sleep(0.05)
        assert text in seen, seen

    try:
        os.write(leader, f"source {script}; echo rea''dy\n".encode())
        appears("ready")
        for typed, more in (("memjax tr", "ain"), ("memjax train --config.train.ste", "ps=")):
            os.write(leader, f"{typed}\t".encode())
            appears(typed + more)
            os.write(leader, b"\x15")  # clears the line
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_they_can_read(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--config.train.steps=" in script
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
