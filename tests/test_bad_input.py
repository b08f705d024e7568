"""Mistakes of the user, from the outside: one clear line, exit status 2, nothing left behind."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from memjax.cli import main

TINY = [
    "--config.model.d_model=16",
    "--config.model.repeat=1",
    "--config.model.pattern=lstm",
    "--config.data.sequence=32",
    "--config.data.batch=2",
    "--config.train.steps=2",
    "--config.train.tensorboard=false",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a cache of its own beside it."""
    monkeypatch.setenv("MEMJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def files(folder):
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def refuse(capfd, here, argv, *parts):
    """Run a command that must be refused; `parts` must all be in its line.

    Only the progress of reading data may come before the line.
    """
    before = files(here)
    capfd.readouterr()
    assert main(argv) == 2
    err = capfd.readouterr().err
    *progress, last = err.strip().splitlines()
    assert last.startswith("memjax: error: "), err
    assert all(line.startswith(("tokenising", "training")) for line in progress), err
    for part in parts:
        assert part in last
    assert files(here) == before


CONFIG_CASES = {
    "unknown section": ("trian.steps=1", "config.trian", "did you mean train?"),
    "unknown field": ("model.d_modle=8", "config.model.d_modle", "did you mean d_model?"),
    "unknown nested field": ("model.mlp.ratoi=2", "config.model.mlp.ratoi", "did you mean ratio?"),
    "text for an integer": ("train.steps=many", "config.train.steps=many", "an integer"),
    "fraction for an integer": ("train.steps=1.5", "config.train.steps=1.5", "an integer"),
    "text for a number": ("optimizer.learning_rate=fast", "optimizer.learning_rate", "a number"),
    "number for a switch": ("train.carry=2", "config.train.carry=2", "true or false"),
    "unknown choice": ("optimizer.name=adam", "config.optimizer.name", "did you mean adamw?"),
    "unknown mixer": ("model.pattern=lstn", "config.model.pattern[0]='lstn'", "choose from"),
    "unknown kind": ("model.mixers.a.kind=mambo", "config.model.mixers.a.kind='mambo'", "mamba?"),
    "zero steps": ("train.steps=0", "config.train.steps=0", "at least 1"),
    "negative rate": ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1.0", "greater"),
    "beta of one": ("optimizer.beta2=1", "config.optimizer.beta2=1.0", "[0, 1)"),
    "negative clip": ("optimizer.clip=-1", "config.optimizer.clip=-1.0", "or none"),
    "average of one": ("optimizer.ema=1", "config.optimizer.ema=1.0", "(0, 1)"),
    "dropout of one": ("model.dropout=1", "config.model.dropout=1.0", "[0, 1)"),
    "empty pattern": ("model.pattern=", "config.model.pattern=()", "at least one mixer"),
    "carry of packed windows": ("train.carry=true", "config.train.carry=True", "documents"),
    "uneven accumulation": ("train.accumulate=3", "config.train.accumulate=3", "data.batch=2"),
    "profile backwards": ("train.profile=9,3", "config.train.profile=(9, 3)", "first <= last"),
    "mesh too large": ("mesh.data=3", "config.mesh", "data=3", "1 device"),
    "two automatic axes": ("mesh.fsdp=auto", "config.mesh.fsdp='auto'", "give one a number"),
    "tensor axis too large": ("mesh.tensor=2", "config.mesh", "tensor=2", "1 device"),
    "stride without windows": ("eval.stride=4", "config.eval.stride=4", "sliding"),
    "memory without a kind": ("model.memory.slots=4", "config.model.memory.kind", "choose from"),
    "vocabulary of bytes": ("data.vocab_size=300", "config.data.vocab_size=300", "bytes"),
    "path for the default": ("data.path=x", "config.data.path"),
    "unknown source": ("data.source=wikitxt", "config.data.source", "did you mean wikitext?"),
    "zero batch": ("data.batch=0", "config.data.batch=0", "at least 1"),
}


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_config_mistake_is_refused(name, here, capfd):
    override, *parts = CONFIG_CASES[name]
    refuse(capfd, here, ["train", "--workdir=run", *TINY, f"--config.{override}"], *parts)


@pytest.mark.parametrize(
    ("pattern", "override", "parts"),
    [
        ("attention", "heads=3", ["mixers.attention.heads=3", "d_model=16", "try"]),
        ("attention", "heads=16", ["mixers.attention.heads=16", "rotary"]),
        ("attention", "kv_heads=3", ["mixers.attention.kv_heads=3", "heads=4"]),
        ("attention", "window=0", ["mixers.attention.window=0", "at least 1"]),
        ("gated_deltanet", "chunk=0", ["mixers.gated_deltanet.chunk=0", "at least 1"]),
        ("linear_attention", "decay=matrix", ["mixers.linear_attention.decay", "'vector'"]),
        ("lstm", "unrol=2", ["mixers.lstm.unrol", "did you mean unroll?"]),
    ],
)
def test_mixer_that_cannot_be_is_refused(pattern, override, parts, here, capfd):
    changes = [f"--config.model.pattern={pattern}", f"--config.model.mixers.{pattern}.{override}"]
    refuse(capfd, here, ["train", "--workdir=run", *TINY, *changes], *parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["trian", "did you mean train?"]),
        (["train", "--workdri=x"], ["--workdri=x", "did you mean --workdir?"]),
        (["train", "--config=nowhere.py"], ["--config=nowhere.py", "no such file"]),
        (["train", "--config"], ["--config", "needs a value"]),
        (["eval"], ["--workdir"]),
        (["eval", "--workdir=nowhere"], ["nowhere"]),
        (["eval", "--workdir=x", "--split=tset"], ["tset", "test"]),
        (["eval", "--workdir=x", "--context=long"], ["--context", "long"]),
        (["generate", "--workdir=nowhere"], ["nowhere"]),
        (["describe", "--workdir=nowhere"], ["nowhere", "config.json"]),
        (["bench", "--lengths=1,x", *TINY], ["--lengths=1,x", "whole numbers"]),
        (["list", "nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_wrong_argument_is_refused(argv, parts, here, capfd):
    refuse(capfd, here, argv, *parts)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


DATA_CASES = {
    "missing path": ("text", {}, "nowhere", ["nowhere"]),
    "empty file": ("text", {"d/a.txt": b""}, "d/a.txt", ["a.txt", "empty"]),
    "empty folder": ("text", {"e/x/.keep": b""}, "e/x", ["e/x"]),
    "binary file": ("text", {"d/a.txt": b"text\0more" * 99}, "d/a.txt", ["a.txt", "4"]),
    "not UTF-8": ("text", {"d/a.txt": b"good \xff bad " * 99}, "d/a.txt", ["a.txt", "5"]),
    "no WikiText": ("wikitext", {"d/a.txt": b"x"}, "d", ["wiki."]),
    "file for a folder": ("wikitext", {"d/a.txt": b"x"}, "d/a.txt", ["a.txt", "folder"]),
    "no PG-19": ("pg19", {"d/a.txt": b"x"}, "d", ["train"]),
    "no training split": ("wikitext", {"d/wiki.test.tokens": b" a \n"}, "d", ["'train'", "only"]),
    "too little text": ("text", {"d/train.txt": b"few words"}, "d", ["sequence"]),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_unusable_data_is_refused(name, here, capfd):
    source, contents, path, parts = DATA_CASES[name]
    for file, content in contents.items():
        write(here / file, content)
    changes = [f"--config.data.source={source}", f"--config.data.path={path}"]
    refuse(capfd, here, ["train", "--workdir=run", *TINY, *changes], *parts)


def test_text_source_without_a_path_is_refused(here, capfd):
    refuse(capfd, here, ["data", "--config.data.source=text"], "data.path")


def test_cache_that_cannot_be_made_is_refused(here, capfd):
    write(here / "file", b"in the way")
    refuse(capfd, here, ["data", "--config.data.cache=file/cache"], "file/cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run, copied by the tests that harm it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    os.environ["MEMJAX_CACHE"] = str(folder.parent / "cache")
    assert main(["train", f"--workdir={folder}", *TINY]) == 0
    return folder


def test_finished_run_says_so_and_ends_well(run, capfd):
    before = files(run)
    assert main(["train", f"--workdir={run}", *TINY]) == 0
    out, err = capfd.readouterr()
    assert "finished" in out + err
    assert {k: v for k, v in files(run).items() if k in before} == before


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train", *TINY, "--config.model.d_model=32"], ["config.model.d_model", "16", "32"]),
        (["train", *TINY, "--config.optimizer.learning_rate=0.5"], ["learning_rate", "0.5"]),
        (["eval", "--step=77"], ["77"]),
        (["eval", "--task=pg19"], ["--data"]),
        (["eval", "--task=text", "--data=nowhere"], ["nowhere"]),
        (["eval", "--stride=3"], ["stride"]),
        (["eval", "--protocol=windows", "--carry=true"], ["carry"]),
        (["generate", "--temperature=-1"], ["temperature"]),
        (["generate", "--top-p=0"], ["top"]),
        (["generate", "--top-k=0"], ["top"]),
        (["generate", "--tokens=-1"], ["tokens"]),
        (["generate", "--prompt-file=nowhere"], ["nowhere"]),
        (["generate", "--prompt=a", "--prompt-file=b"], ["--prompt-file"]),
    ],
)
def test_mistake_about_a_run_is_refused_and_leaves_it_alone(argv, parts, run, capfd):
    refuse(capfd, run, [argv[0], f"--workdir={run}", *argv[1:]], *parts)


def copied(run, tmp_path):
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("config.json", b"{", "eval"),
        ("config.json", b'{"model": {"d_model": "wide"}}', "eval"),
        ("tokenizer.json", b"[]", "generate"),
        ("tokenizer.json", None, "eval"),
        ("config.json", b"{", "train"),
    ],
)
def test_damaged_run_is_refused_by_name(file, content, command, run, tmp_path, capfd):
    harmed = copied(run, tmp_path)
    (harmed / file).unlink() if content is None else (harmed / file).write_bytes(content)
    arguments = TINY if command == "train" else []
    refuse(capfd, harmed, [command, f"--workdir={harmed}", *arguments], file)


def test_workdir_with_other_files_is_refused(here, capfd):
    write(here / "mine" / "thesis.txt", b"precious")
    refuse(capfd, here, ["train", "--workdir=mine", *TINY], "mine")


def test_workdir_that_is_a_file_is_refused(here, capfd):
    write(here / "mine", b"precious")
    refuse(capfd, here, ["train", "--workdir=mine", *TINY], "mine")


def command(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "memjax", *argv], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["train", "--config.model.d_modle=8"], "did you mean d_model?"),
        (["eval", "--workdir=nowhere"], "nowhere"),
    ],
)
def test_process_ends_with_status_2_and_one_line(argv, part, here):
    done = command(*argv)
    assert done.returncode == 2
    assert part in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout and not files(here)


def test_full_disk_is_one_line_and_keeps_what_was_there(run, tmp_path):
    """A limit on file sizes stands for the full disk: writes fail in the same places."""
    folder = copied(run, tmp_path)
    before = (folder / "checkpoints").exists() and set(os.listdir(folder / "checkpoints"))
    steps = [a.replace("steps=2", "steps=4") for a in TINY]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    done = command("train", f"--workdir={folder}", *steps, preexec_fn=limit)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert "copy" in done.stderr.strip().splitlines()[-1]
    assert before <= set(os.listdir(folder / "checkpoints"))
    again = command("train", f"--workdir={folder}", *steps)
    assert again.returncode == 0, again.stderr
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 4
