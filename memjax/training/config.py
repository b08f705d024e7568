"""Configs of the training side: optimizer, loop and checkpoints."""

import dataclasses
from typing import Literal

from memjax.config import check, check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Gradient update and learning-rate schedule.

    schedule: after `warmup` steps, "cosine" falls to final * learning_rate at the end; "wsd"
        (warm-up, stable, decay) holds and falls linearly over the last share `decay`; "constant".
    schedule_steps: length of the schedule; None is train.steps.
    beta1, beta2, eps: of Adam, and the betas of Lion. momentum: of Muon, which updates matrices;
        Adam updates the other parameters.
    clip: largest global gradient norm; None for no clipping.
    ema: decay of an exponential moving average of the weights, with which evaluation is done.
    table_rate: learning rate of large tables, whose rows few tokens read, over that of the rest.
    """

    name: Literal["adamw", "muon", "lion"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    schedule_steps: int | None = None
    warmup: int = 100
    decay: float = 0.2
    final: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    ema: float | None = None
    table_rate: float = 1.0

    def __post_init__(self):
        check(self, "table_rate", self.table_rate > 0, "must be greater than 0")
        check(self, "learning_rate", self.learning_rate > 0, "must be greater than 0")
        check_at_least(self, 0, "warmup", "weight_decay")
        check_at_least(self, 1, "schedule_steps")
        for name in ("decay", "final"):
            check(self, name, 0 <= getattr(self, name) <= 1, "must be in [0, 1]")
        for name in ("beta1", "beta2", "momentum"):
            check(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        check(self, "eps", self.eps > 0, "must be greater than 0")
        check(self, "clip", self.clip is None or self.clip > 0, "must be greater than 0, or none")
        check(self, "ema", self.ema is None or 0 < self.ema < 1, "must be in (0, 1), or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop.

    steps: optimizer steps. carry: whether memory state is carried from step to step along each
    row's document (needs data.stream="documents"). horizon: segments through which the gradient
    flows; a step reads `horizon` segments of data.sequence tokens. accumulate: parts into which
    the batch is cut, their gradients added. z_loss: weight of log(Z)^2. max_skipped: steps with a
    non-finite loss or gradient in a row that end the run. profile: first and last step of a
    profiler capture. wandb: project to log to.
    """

    steps: int = 1000
    carry: bool = False
    horizon: int = 1
    accumulate: int = 1
    z_loss: float = 0.0
    seed: int = 0
    log_every: int = 10
    max_skipped: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        check_at_least(self, 1, "steps", "horizon", "accumulate", "log_every", "max_skipped")
        check_at_least(self, 0, "z_loss", "seed")
        ordered = self.profile is None or 0 < self.profile[0] <= self.profile[1]
        check(self, "profile", ordered, "must be (first, last) with 0 < first <= last")

    @property
    def pieces(self) -> int:
        """Forward passes a step."""
        return self.horizon * self.accumulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Every `every` steps and at the end; the last `keep` and the best `keep_best` are kept.

    The best have the lowest loss on the validation split, so keep_best needs eval.every.
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 1

    def __post_init__(self):
        check_at_least(self, 1, "every", "keep")
        check_at_least(self, 0, "keep_best")
