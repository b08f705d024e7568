"""Config of evaluation: how perplexity is measured, during training and after."""

import dataclasses
from typing import Literal

from memjax.config import check, check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Perplexity protocol, and how often it runs during training.

    every: steps between evaluations on the validation split; None for none at all.
    tokens: at most so many tokens an evaluation during training; None for the whole split.
    memory_tokens: of the validation split that are read to measure every memory (`memjax inspect`)
        at each evaluation during training; None for no such measures.
    protocol: "stream" reads documents in order, segment after segment, with the memory carried;
        "windows" reads disjoint windows from the initial state; "sliding" reads windows of
        `context` tokens that move by `stride` and scores only the last `stride` of each.
    context: tokens a segment or window; None is data.sequence.
    stride: for "sliding"; None is half the context.
    carry: whether "stream" carries the state (false: zeroed before every segment).
    batch: documents or windows evaluated side by side.
    """

    every: int | None = None
    tokens: int | None = 100_000
    memory_tokens: int | None = 256
    protocol: Literal["stream", "windows", "sliding"] = "stream"
    context: int | None = None
    stride: int | None = None
    carry: bool = True
    batch: int = 8

    def __post_init__(self):
        check_at_least(self, 1, "every", "tokens", "memory_tokens", "context", "stride", "batch")
        sliding = self.protocol == "sliding"
        check(self, "stride", self.stride is None or sliding, 'needs protocol="sliding"')
        inside = None in (self.stride, self.context) or self.stride <= self.context  # type: ignore
        check(self, "stride", inside, f"must be at most context={self.context}")
