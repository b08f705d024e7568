"""The training loop: from a config and a folder to a trained model, stopped and resumed exactly."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import grain
import jax

import memjax
from memjax import config as configs
from memjax.config import ConfigError
from memjax.data import Corpus, TaskCorpus, open_data
from memjax.data.streams import Batch, batches, iterate
from memjax.distributed import Watch, compiled, straggler
from memjax.evals.inspection import quick_inspection
from memjax.evals.perplexity import quick_eval
from memjax.evals.tasks import quick_task
from memjax.experiment import Experiment
from memjax.sharding import make_mesh, process_rows
from memjax.training import workdir as workdirs
from memjax.training.checkpoint import Checkpoints, list_steps, read_meta
from memjax.training.clock import Clock
from memjax.training.errors import Diverged, Interrupted, TrainingError
from memjax.training.metrics import check_wandb, open_sinks
from memjax.training.profiler import Profiler
from memjax.training.progress import Report, make_report
from memjax.training.signals import Stop, caught
from memjax.training.step import Metrics, Trainer, TrainState, make_trainer, put_batch

TASK_ROWS = 1024  # of an evaluation during training without eval.tokens


def train(
    experiment: Experiment, workdir: str | Path, watch: Watch | None = None
) -> dict[str, Any]:
    """Train to experiment.train.steps in `workdir`, from its newest checkpoint if it has one.

    watch: of the other processes of the run (`memjax.distributed.connect`); each calls this alike.

    Returns a summary: step, steps, loss, eval_loss, tokens, seconds, spent (seconds on training,
    evaluating and saving), goodput, starts, skipped, parameters, workdir and already_finished
    (nothing was done).

    Raises ConfigError or DataError for what the user can mend, TrainingError if the run cannot go
    on, Interrupted after a signal: the state is saved, and the same call goes on.
    """
    folder = Path(workdir)
    first = jax.process_index() == 0
    with workdirs.locked(folder) if first else contextlib.nullcontext():
        check_wandb(experiment.train.wandb)
        changed = workdirs.changes(folder, experiment)
        report = make_report(experiment.train.steps, first)
        finished = _finished(experiment, folder)
        if finished is not None:
            report.note(f"{folder} is finished: it has {finished['step']} steps")
            return finished
        with caught() as stop:
            run = _Run(experiment, folder, report, stop, watch)
            _note_changes(report, experiment, changed)
            return run.run()


def _finished(experiment: Experiment, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has all its steps; None if there is something to do."""
    steps = list_steps(workdir / "checkpoints")
    if not steps or steps[-1] < experiment.train.steps:
        return None
    meta = read_meta(workdir / "checkpoints" / str(steps[-1]))
    return None if meta is None else {**meta["summary"], "already_finished": True}


def _note_changes(report: Report, experiment: Experiment, changed: dict) -> None:
    for key, (old, new) in changed.items():
        report.note(f"{key}: {old} -> {new}")
    follows = experiment.optimizer.schedule != "constant"
    if "config.train.steps" in changed and follows and experiment.optimizer.schedule_steps is None:
        report.note("the learning rate follows the new train.steps from here on")


class _Run:
    """A run in progress: everything it holds between steps.

    state and step belong together; pending are metrics of `step` not yet fetched.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        report: Report,
        stop: Stop,
        watch: Watch | None,
    ):
        self.experiment, self.workdir, self.report, self.stop = experiment, workdir, report, stop
        self.watch = watch
        mesh = make_mesh(experiment.mesh, experiment.data.batch)  # before the work of the data
        self.corpus = open_data(experiment.data, "train")
        tokenizer = self.corpus.tokenizer
        self.valid: Corpus | TaskCorpus | None = None
        if experiment.eval.every is not None:
            self.valid = open_data(experiment.data, "valid", tokenizer)
        rows = process_rows(mesh, experiment.data.batch)
        self.stream: grain.MapDataset = batches(
            experiment.data, self.corpus, segments=experiment.train.horizon, process=rows
        )
        self.trainer: Trainer = make_trainer(experiment, tokenizer.vocab_size, mesh)
        if jax.process_index() == 0:
            workdirs.write_run(workdir, experiment, tokenizer)
        keep = experiment.checkpoint
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep.keep, keep.keep_best)
        self.step = self.saved = self.evaluated = 0
        self.pending: tuple[int, Metrics] | None = None
        self.last: dict[str, Any] = {}
        self.eval_loss: float | None = None
        self.skipping = False
        self.advance: Callable | None = None  # the compiled step
        self.state, self.clock = self._begin()
        self.best = self.checkpoints.best_loss()

    def _begin(self) -> tuple[TrainState, Clock]:
        """The state to go on with: that of the newest sound checkpoint, or a new one."""
        restored = self.checkpoints.restore(self.trainer.abstract)
        starts = workdirs.sessions(self.workdir)
        self.starts, began = 1 + len(starts), starts[0]["time"] if starts else None
        if restored is None:
            return compiled(self.trainer.init)(), Clock(began=began)
        for line in restored.report:
            self.report.note(line)
        meta = restored.meta
        if meta["corpus"] != self.corpus.digest:
            raise ConfigError(
                f"the data changed since the run in {self.workdir} began (corpus digest "
                f"{meta['corpus'][:12]} -> {self.corpus.digest[:12]}); bring back the old data, "
                "or choose another --workdir"
            )
        self.step = self.saved = restored.step
        self.last = meta["summary"]
        self.report.note(f"going on from step {restored.step} of {self.workdir}")
        before = meta["summary"]
        clock = Clock(before["tokens"], before["seconds"], before.get("spent"), began)
        return restored.state, clock

    def run(self) -> dict[str, Any]:
        """Train to the end."""
        train = self.experiment.train
        first = jax.process_index() == 0
        if first:
            workdirs.begin_session(self.workdir, self.step, jax.process_count())
        self.sinks = open_sinks(self.experiment, self.workdir, self.step) if first else []
        self.report.note(self._headline())
        self.report.start(self.step)
        try:
            with (
                contextlib.closing(self._batches()) as stream,
                Profiler(train.profile, self.workdir / "profile") as profiler,
            ):
                while self.step < train.steps:
                    profiler.before(self.step + 1)
                    self._advance(stream)
                    profiler.after(self.step, self.state)
                    self._boundary()
            self._save()
            self.checkpoints.wait()
            return self._summary()
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            for sink in self.sinks:
                sink.close()
            self.report.close()

    def _batches(self) -> Generator[Batch, None, None]:
        yield from iterate(self.stream, self.step, self.experiment.data.threads)

    def _advance(self, stream: Iterator[Batch]) -> None:
        """One step; the metrics of the one before are fetched while it runs."""
        with self.clock.host():
            arrays = put_batch(next(stream), self.trainer.mesh)
        before = self.pending
        if self.advance is None:
            self.advance = compiled(self.trainer.step, self.state, arrays)
        self.state, metrics = self.advance(self.state, arrays)
        self.step += 1
        self.pending = (self.step, metrics)
        if before is not None:
            self._settle(*before)

    def _boundary(self) -> None:
        """What is due after the step: evaluation, a checkpoint, an end by a signal."""
        config, step = self.experiment, self.step
        self.checkpoints.check()
        last = step == config.train.steps
        every = config.eval.every
        evaluate = every is not None and (step % every == 0 or last)
        received = self.stop.after(step)
        save = step % config.checkpoint.every == 0 or last or received is not None
        if not (evaluate or save):
            return
        values = self._evaluate() if evaluate else {}
        self._fetch(values)
        loss = _finite(values.get("eval_loss"))
        better = loss is not None and (self.best is None or loss < self.best)
        if better:
            self.best = loss
        # While updates are left out, a checkpoint of the step that ruined the run is worth nothing.
        wait = self.skipping and received is None and not last
        if (save or (better and config.checkpoint.keep_best > 0)) and not wait:
            self._save()
        if received is not None and not last:
            self.checkpoints.wait()
            raise Interrupted(received, step)

    def _fetch(self, values: dict[str, float] | None = None) -> None:
        """Wait for the newest step and take note of its metrics."""
        if self.pending is not None:
            (step, metrics), self.pending = self.pending, None
            self._settle(step, metrics, values)

    def _settle(self, step: int, metrics: Metrics, values: dict[str, float] | None = None) -> None:
        """Take note of the metrics of a step; write a record if one is due."""
        train, metrics = self.experiment.train, jax.device_get(metrics)
        tokens = float(metrics.tokens)  # not finite if the weights of the batch are not
        self.clock.step(round(tokens) if math.isfinite(tokens) else 0)
        self.report.step(step)
        self.last = {
            "step": step,
            "loss": float(metrics.loss),
            "tokens": self.clock.tokens,
            "tokens_per_s": 0.0,
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "auxiliary_loss": float(metrics.auxiliary),
            "skipped": int(metrics.skipped),
            "seconds": self.clock.seconds(),
        }
        self.skipping = not metrics.finite
        if self.skipping:
            self._skipped(step, metrics)
        if step % train.log_every == 0 or step == train.steps or values:
            pace, rate = self.clock.pace(), {"tokens_per_s": self.clock.rate()}
            record = self.last | rate | pace | {"goodput": self.clock.goodput()} | (values or {})
            self._compare(step, pace)
            for sink in self.sinks:
                sink.write(record)
            self.report.record(record)

    def _compare(self, step: int, pace: dict[str, Any]) -> None:
        """Tell the other processes how fast this one is; name one that holds the others up."""
        if self.watch is None:
            return
        self.watch.tell(step=step, **pace)
        line = straggler(self.watch.others())
        if line is not None:
            self.report.note(f"step {step}: {line}")

    def _skipped(self, step: int, metrics: Metrics) -> None:
        row, limit = int(metrics.skipped_in_row), self.experiment.train.max_skipped
        self.report.note(
            f"step {step} (batch {step - 1}) left out: loss {float(metrics.loss):.4g}, gradient "
            f"norm {float(metrics.grad_norm):.4g}"
        )
        if row >= limit:
            kept = self.checkpoints.steps()
            there = f"the newest checkpoint is of step {kept[-1]}" if kept else "none was saved"
            raise Diverged(
                f"steps {step - row + 1} to {step} (batches {step - row} to {step - 1}) had a "
                f"non-finite loss or gradient, train.max_skipped={limit} in a row; {there}; lower "
                "optimizer.learning_rate, or set optimizer.clip"
            )

    def _evaluate(self) -> dict[str, float]:
        assert self.valid is not None
        with self.clock.paused("evaluating"):
            params = self.state.params if self.state.ema == () else self.state.ema
            parts, config = (self.trainer.definition, params), self.experiment
            length, mesh = config.data.sequence, self.trainer.mesh
            if isinstance(self.valid, TaskCorpus):
                length *= config.train.horizon
                rows = TASK_ROWS if config.eval.tokens is None else -(-config.eval.tokens // length)
                values = quick_task(parts, self.valid, length=length, rows=rows, mesh=mesh)
            else:
                values = quick_eval(parts, self.valid, config.eval, sequence=length, mesh=mesh)
                count = config.eval.memory_tokens
                if count is not None and jax.process_count() == 1:
                    told = quick_inspection(parts, config.model, self.valid, count)
                    values |= {f"eval_{name}": value for name, value in told.items()}
        self.eval_loss, self.evaluated = _finite(values["eval_loss"]), self.step
        return values

    def _save(self) -> None:
        if self.saved == self.step:
            return
        self._fetch()
        with self.clock.paused("saving"):
            meta = {
                "position": self.step,
                "corpus": self.corpus.digest,
                "tokenizer": self.corpus.tokenizer.digest,
                "config": configs.to_dict(self.experiment),
                "version": memjax.__version__,
                "eval_loss": self.eval_loss if self.evaluated == self.step else None,
                "summary": self._summary(),
            }
            self.checkpoints.save(self.step, self.state, meta)
        self.saved = self.step

    def _rescue(self, error: Exception) -> None:
        """Save the last good state, if there is one, before `error` ends the run."""
        expected = isinstance(error, TrainingError | Interrupted)
        alive = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        if self.watch is not None:
            if isinstance(error, jax.errors.JaxRuntimeError):
                self.watch.confirm(error)  # does not return if another process is gone
            return  # the others are in another step: nothing can be saved together
        with contextlib.suppress(Exception):  # `error` is what the user must see
            if not expected and alive:
                self._save()
                self.report.note(f"saved at step {self.step} before the error below")
            self.checkpoints.wait()

    def _headline(self) -> str:
        data, train = self.experiment.data, self.experiment.train
        count = self._parameters()
        devices = self.trainer.mesh.devices.size
        tokens = data.batch * data.sequence * train.horizon
        return (
            f"{count:,} parameters, {tokens:,} tokens a step, {devices} "
            f"{jax.devices()[0].platform} device{'s' if devices > 1 else ''}"
        )

    def _parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def _summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.experiment.train.steps,
            "loss": _finite(self.last.get("loss")),
            "eval_loss": self.eval_loss,
            "tokens": self.clock.tokens,
            "seconds": self.clock.seconds(),
            "spent": {kind: round(spent, 3) for kind, spent in self.clock.spent.items()},
            "goodput": self.clock.goodput(),
            "starts": self.starts,
            "skipped": self.last.get("skipped", 0),
            "parameters": self._parameters(),
            "workdir": str(self.workdir),
            "already_finished": False,
        }


def _finite(value: float | None) -> float | None:
    """None for what JSON cannot hold and nothing can be compared with."""
    return value if value is not None and math.isfinite(value) else None
