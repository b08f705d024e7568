"""What kind of memory a Miras layer has: four choices, and three published sets of them."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from memjax.config import OneOf, check, check_at_least
from memjax.layers import check_heads
from memjax.mixers.base import MixerConfig
from memjax.positions import NoPE, PositionField, Rotary
from pallas_kernels.neural_memory import (
    BIASES,
    KL,
    L2,
    LEARNERS,
    MLP,
    RETENTIONS,
    STRUCTURES,
    Bias,
    DotProduct,
    GradientDescent,
    Huber,
    Learner,
    LinearMap,
    Lp,
    Lq,
    Mirror,
    Retention,
    Rule,
    Structure,
    WeightDecay,
)

NORM_EPS = 1.0
"""Added to the variance in the memory's LayerNorm. With the usual 1e-6, the gradients of weights
that decay, or that share what they sum to, grow without end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirasConfig(MixerConfig):
    """Base of the configs of Miras: what is around the memory.

    position: turns queries and keys; one that lowers logits (ALiBi) has nothing to lower here.
    conv: width of the short convolutions on queries, keys and values; None for none.
    update_every: tokens whose gradients are taken at the same weights. Changes the mathematics.
    rate_cap: the largest inner learning rate of a token.
    """

    heads: int = 4
    position: PositionField = Rotary()
    conv: int | None = 4
    update_every: int = 32
    rate_cap: float = 0.1
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "conv", "update_every")
        check(self, "rate_cap", self.rate_cap > 0, "must be greater than 0")
        turns = self.position.slopes(self.heads) is None
        check(self, "position", turns, "lowers logits, which a memory has not; use rotary or nope")

    @property
    def rule(self) -> Rule:
        """The memory in the terms of `pallas_kernels.neural_memory`."""
        raise NotImplementedError

    def check_width(self, d_model: int) -> None:
        check_heads(self, d_model)
        size = d_model // self.heads
        rule = f"gives head size {size}, but rotary positions need an even one"
        check(self, "heads", size % 2 == 0 or not isinstance(self.position, Rotary), rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Miras(MirasConfig):
    """Any memory of the space; the fields of `MirasConfig`, and the four choices.

    structure: what the memory computes from a key. bias: what it calls an error. retention: what
    it keeps. learner: how it learns. docs/miras.md lists them, and the known points of the space.
    """

    kind: ClassVar[str] = "miras"
    structure: Annotated[Structure, OneOf(lambda: STRUCTURES)] = MLP(
        layers=2, expansion=4, norm_eps=NORM_EPS
    )
    bias: Annotated[Bias, OneOf(lambda: BIASES)] = L2()
    retention: Annotated[Retention, OneOf(lambda: RETENTIONS)] = WeightDecay()
    learner: Annotated[Learner, OneOf(lambda: LEARNERS)] = GradientDescent()
    position: PositionField = NoPE()

    def __post_init__(self):
        super().__post_init__()
        _check_together(self)

    @property
    def rule(self) -> Rule:
        return Rule(self.structure, self.bias, self.retention, self.learner)


def _check_together(config: Miras) -> None:
    """Refuse choices that are sound alone and not together."""
    structure, bias, retention, learner = config.rule
    if isinstance(bias, Lp) and bias.power > 2:
        rule = (
            f"of power {bias.power} makes steps grow faster than errors, which structure="
            f"{structure.kind} without residual_norm does not bound; use power <= 2 or huber"
        )
        check(config, "bias", structure.bounded, rule)
    if isinstance(bias, DotProduct):
        linear = isinstance(structure, LinearMap) or len(structure.shapes(2, 2)) == 1
        rule = (
            f"has no lowest value, and the weights of structure={structure.kind} without "
            "residual_norm would multiply each other without end; use l2, or structure=linear"
        )
        check(config, "bias", structure.bounded or linear, rule)
    if isinstance(retention, Lq) and retention.power > 3:
        rule = (
            f"of power {retention.power} shrinks weights where they are to grow, which structure="
            f"{structure.kind} without residual_norm cannot make up for; use mirror"
        )
        check(config, "retention", structure.bounded, rule)
    if isinstance(retention, Mirror):
        rule = (
            f"of power {retention.power} multiplies the steps of the largest weights; gradients "
            "then grow from block to block; use power <= 3"
        )
        check(config, "retention", retention.power <= 3, rule)
    rule = (
        f"steps in what retention={retention.kind} accumulates, of another scale than its weights; "
        "use gradient_descent"
    )
    check(config, "learner", retention.own_scale or not learner.momentum, rule)
    if not structure.bounded and retention.own_scale and not isinstance(bias, DotProduct | Huber):
        rule = (
            f"with update_every={config.update_every} makes steps of a repeated key diverge, which "
            f"structure={structure.kind} without residual_norm does not bound; try "
            f"{2 / config.update_every:g}, which is 2 / update_every"
        )
        check(config, "rate_cap", config.rate_cap * config.update_every <= 2, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moneta(MirasConfig):
    """The fields of `MirasConfig`; errors to the power `error_power`, `Lq` of `retention_power`.

    expansion: width of the memory's hidden layer, in head sizes.
    """

    kind: ClassVar[str] = "moneta"
    expansion: int = 4
    error_power: float = 3.0
    retention_power: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "expansion", "error_power")
        check_at_least(self, 2, "retention_power")

    @property
    def rule(self) -> Rule:
        bias, retention = Lp(power=self.error_power), Lq(power=self.retention_power)
        return Rule(_published(self.expansion), bias, retention, GradientDescent())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yaad(MirasConfig):
    """The fields of `MirasConfig`; expansion: width of the hidden layer, in head sizes."""

    kind: ClassVar[str] = "yaad"
    expansion: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "expansion")

    @property
    def rule(self) -> Rule:
        return Rule(_published(self.expansion), Huber(), WeightDecay(), GradientDescent())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memora(MirasConfig):
    """The fields of `MirasConfig`; expansion: width of the hidden layer, in head sizes.

    total: weights into a channel sum to total * sqrt(number of inputs).
    """

    kind: ClassVar[str] = "memora"
    expansion: int = 4
    total: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "expansion")
        check(self, "total", self.total > 0, "must be greater than 0")

    @property
    def rule(self) -> Rule:
        return Rule(_published(self.expansion), L2(), KL(total=self.total), GradientDescent())


def _published(expansion: int) -> Structure:
    """x + LayerNorm(gelu(x W_1) W_2), arXiv:2504.13173, Sec. 5.3."""
    return MLP(layers=2, expansion=expansion, norm_eps=NORM_EPS)
