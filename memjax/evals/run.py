"""What `memjax eval` and `memjax generate` do with a trained run."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from memjax.config import ConfigError, build
from memjax.data import Data, DataError, Tokenizer, open_corpus
from memjax.data.generated import open_task
from memjax.evals.config import Eval
from memjax.evals.generation import generate
from memjax.evals.partial import Partial
from memjax.evals.perplexity import Parts, evaluate
from memjax.evals.progress import scoring
from memjax.evals.protocols import resolve, take
from memjax.evals.tasks import evaluate_task
from memjax.experiment import Experiment
from memjax.model import LanguageModel
from memjax.model import split as split_model
from memjax.training.checkpoint import read_params
from memjax.training.signals import caught
from memjax.training.workdir import load_experiment, load_tokenizer, write_atomically

TASKS = ("wikitext", "pg19", "text", "stdlib")
TASK_ROWS = 2048
NOTICE = "memjax: stopping: saves after this batch (Ctrl-C again ends it at once)\n"


class Run(NamedTuple):
    """A trained model: its config, weights (the averaged ones if it has them) and tokenizer."""

    experiment: Experiment
    parts: Parts
    tokenizer: Tokenizer
    step: int


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """The newest checkpoint of a run, or that of `step`, on the first device.

    Raises ConfigError, DataError or CheckpointError, one line, if there is none to load.
    """
    folder = Path(workdir)
    experiment = load_experiment(folder)
    tokenizer = load_tokenizer(folder)
    lm = nnx.eval_shape(
        lambda: LanguageModel(experiment.model, tokenizer.vocab_size, rngs=nnx.Rngs(0))
    )
    definition, shapes = split_model(lm)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    step, params = read_params(folder / "checkpoints", wanted, step)
    return Run(experiment, (definition, params), tokenizer, step)


def run_eval(
    workdir: str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    split: str = "test",
    protocol: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    carry: bool | None = None,
    batch: int | None = None,
    step: int | None = None,
    max_documents: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run and write `eval/<task>-<split>-<protocol>-....json` in its folder.

    The name ends in the step and in a digest of the text, so that no result replaces another.

    task: None is the run's own source, and then data may be left out.
    protocol, context, stride, carry, batch: None is what the run's config says.
    step: None is the newest checkpoint. The averaged weights are used if the run has them.
    max_documents: score only the first documents of the split (the result says so).

    Returns what was written (`memjax.evals.result.Result.to_dict`). Raises ConfigError or
    DataError, one line, for a mistake of the caller; Stopped after a signal: the same call goes on
    where this one was, and finds what one call would have found.
    """
    run = load_run(workdir, step)
    experiment = run.experiment
    if experiment.data.task is not None:
        return _run_task(run, Path(workdir), task, data, split, context, batch)
    settings = eval_config(
        experiment.eval,
        protocol=protocol,
        context=context,
        stride=stride,
        carry=carry,
        batch=batch,
    )
    sequence = experiment.data.sequence
    cut = resolve(settings, sequence)
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"--max_documents={max_documents} must be at least 1")
    source = task_data(experiment, task, data)
    corpus = open_corpus(source, split, tokenizer=run.tokenizer)
    total = sum(span.targets for span in take(corpus, cut.context, None, max_documents))
    name = [corpus.source, corpus.split, cut.name, f"context{cut.context}"]
    name += [f"stride{cut.stride}"] if cut.stride is not None else []
    name += ["zeroed"] if cut.name == "stream" and not cut.carry else []
    name += [f"documents{max_documents}"] if max_documents is not None else []
    name += [f"step{run.step}", corpus.digest[:8]]
    folder, full = Path(workdir) / "eval", "-".join(name)
    with caught(NOTICE) as stop:
        told = {"batch": settings.batch, "text": corpus.digest}
        partial = Partial(folder / f".{full}.part", stop, run.parts[1], told)
        with scoring(f"{corpus.source} {corpus.split} {cut.name}", total, partial.tokens) as count:
            result = evaluate(
                run.parts,
                corpus,
                settings,
                sequence=sequence,
                max_documents=max_documents,
                step=run.step,
                progress=count,
                partial=partial,
            )
        values = {**result.to_dict(), "data": source.path, "data_digest": corpus.digest}
        _write(folder, full, values)
        partial.clear()
    return values


def _run_task(
    run: Run,
    workdir: Path,
    task: str | None,
    data: str | None,
    split: str,
    context: int | None,
    batch: int | None,
) -> dict[str, Any]:
    """Accuracy of a run that learned a synthetic task, on rows of `context` symbols."""
    config = run.experiment.data
    assert config.task is not None
    if task not in (None, config.task.kind) or data is not None:
        raise ConfigError(
            f"--task={task} --data={data}: the run learned the task {config.task.kind}; leave both "
            "out"
        )
    if context is not None and context < 1:
        raise ConfigError(f"--context={context} must be at least 1")
    length = context or config.sequence * run.experiment.train.horizon
    corpus = open_task(config, split)
    result = evaluate_task(
        run.parts, corpus, length=length, rows=TASK_ROWS, batch=batch or run.experiment.eval.batch
    )
    values = {"task": config.task.kind, "split": split, "context": length, **result}
    values |= {"step": run.step, "data_digest": corpus.digest}
    name = [config.task.kind, split, f"context{length}", f"step{run.step}", corpus.digest[:8]]
    _write(workdir / "eval", "-".join(name), values)
    return values


def run_generate(
    workdir: str | Path,
    *,
    prompt: str = "",
    prompt_file: str | Path | None = None,
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
    echo: bool = False,
) -> dict[str, Any]:
    """Continue a prompt with a run: `prompt, text, tokens, seed, step`; text is what is new.

    prompt_file: read the prompt from there instead. echo: print the prompt, then the text as it is
    made. Raises ConfigError or DataError, one line, for a mistake of the caller.
    """
    if prompt_file is not None:
        prompt = _read_text(Path(prompt_file))
    run = load_run(workdir, step)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if echo:
        show(prompt)
    text = generate(
        run.parts,
        run.tokenizer,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        segment=run.experiment.data.sequence,
        stream=show if echo else None,
    )
    if echo:
        show("\n")
    return {"prompt": prompt, "text": text, "tokens": tokens, "seed": seed, "step": run.step}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file={path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file={path}: not UTF-8 at byte {error.start}") from None


def eval_config(
    config: Eval,
    *,
    protocol: str | None,
    context: int | None,
    stride: int | None,
    carry: bool | None,
    batch: int | None,
) -> Eval:
    """The run's evaluation config with what the caller set; errors name the flags."""
    chosen = config.protocol if protocol is None else protocol
    if carry and chosen != "stream":
        raise ConfigError(f"--carry=true needs --protocol=stream, not {chosen}: it has no state")
    given = {"context": context, "stride": stride, "carry": carry, "batch": batch}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if stride is None and (chosen != "sliding" or context is not None):
        changes["stride"] = None
    return build(Eval, {**_fields(config), **changes, "protocol": chosen}, "eval")


def task_data(experiment: Experiment, task: str | None, path: str | None) -> Data:
    """Where the text of a task is; the tokenizer settings stay those of the run."""
    data = experiment.data
    task = data.source if task is None else task
    if task not in TASKS:
        raise ConfigError(f"--task={task} must be one of {', '.join(TASKS)}")
    if path is None and task == data.source:
        return data
    if path is None and task != "stdlib":
        raise DataError(f"--task={task} needs --data=PATH: the run was trained on {data.source}")
    return build(Data, {**_fields(data), "source": task, "path": path}, "data")


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); make room there") from None
    write_atomically(folder / f"{name}.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
