"""DeltaNet: a linear memory that corrects what it holds for a key, and never decays."""

import dataclasses
from typing import ClassVar

from flax import nnx

from memjax.layers import check_heads
from memjax.mixers.delta import DeltaConfig, DeltaMixer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNet(DeltaConfig):
    """As `DeltaConfig`; key_size, value_size: None is d_model / heads, which must be whole."""

    kind: ClassVar[str] = "deltanet"

    def check_width(self, d_model: int) -> None:
        if None in (self.key_size, self.value_size):
            check_heads(self, d_model)


class DeltaNetMixer(DeltaMixer):
    """Replace what the memory holds for k_t by a step of size beta towards v_t.

    memory_t = memory_{t-1} + k_t (beta_t (v_t - memory_{t-1}^T k_t))^T
    o_t = K^(-1/2) memory_t^T q_t;   y_t = W_o RMSNorm(o_t)
    q, k, v = silu(conv(W x)), q and k of unit norm; beta = sigmoid(W_b x)

    State: the memory, float32 [B, H, K, V], and the tails of the convolutions.
    Source: arXiv:2406.06484, Secs. 2.2 and 3.3.
    """

    def __init__(self, config: DeltaNet, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        size = d_model // config.heads
        sizes = config.key_size or size, config.value_size or size
        super().__init__(config, d_model, *sizes, rngs=rngs)
        self._make_readout(d_model, gated=False, rngs=rngs)
