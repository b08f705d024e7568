"""Softmax attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, validate
from pallas_kernels.attention import gpu, maintained, tpu
from pallas_kernels.attention.chunked import attention_chunked
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.attention.rule import Places, Rule

OP = "attention"
IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": attention_chunked,
    "tpu": tpu.attention_tpu,
    "gpu": gpu.attention_gpu,
    "splash": maintained.attention_splash,
    "cudnn": maintained.attention_cudnn,
}

TokenIntegers = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B J"]]


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B J G K"],
    v: Float[Array, "B J G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: TokenIntegers | None = None,
    positions: TokenIntegers | None = None,
    bias: Float[Array, "H"] | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    impl: str = "auto",
) -> Float[Array, "B T H V"]:
    """Softmax attention of a segment over keys that may begin before it.

        s_tj = cap(scale q_t . k_j) - bias (position_t - position_j)
        o_t = sum_j e^{s_tj} v_j / (e^sink + sum_j e^{s_tj})

    over the keys j that t sees; without `logit_cap` cap(x) = x, without `sinks` e^sink is 0.

    Shapes: q `[B, T, H, K]`; k `[B, J, G, K]`; v `[B, J, G, V]`, with H a multiple of G: query head
    h reads key head h // (H / G). o `[B, T, H, V]`, in the dtype of q; scores, softmax and sums are
    float32 (float64 if q, k or v is).
    Positions: None puts key j at j and query t at J - T + t (a cache, then the segment). Otherwise
    integers `[B, T]` for both (J = T), or a pair (queries `[B, T]`, keys `[B, J]`).
    Seen: with `causal`, keys at the query's position or before; with `window`, keys less than
    `window` positions behind (the query's own counts); with `segment_ids` (as `positions`: one
    array or a pair), keys of the query's own id, and never a key of negative id (an empty slot of
    a cache). A query that sees no key gives zeros.
    `bias`: None, or ALiBi slopes `[H]`. `scale` None means K**-0.5.
    `logit_cap`: None, or the c > 0 of cap(x) = c tanh(x / c), in front of `bias` and of what is
    hidden. `sinks`: None, or a logit `[H]` that takes its part of every softmax and brings no
    value; 0 is a softmax whose denominator has one more.
    Without `positions`, blocks of keys that `causal` or `window` exclude are not computed. The
    J - T keys in front of the segment are not computed while all their segment ids are negative.
    Differentiable once, in q, k, v, bias and sinks. No array of T x J is formed (except by
    "reference").
    Errors: ValueError for shapes or dtypes that disagree, H not a multiple of G, window < 1,
    logit_cap <= 0, one array for both where J is not T, or an implementation that is not available.
    Source: arXiv:1706.03762; blocks arXiv:2205.14135; slopes arXiv:2108.12409; grouped heads
    arXiv:2305.13245; cap arXiv:2408.00118, in front of the slopes as in FlashAttention; sinks
    arXiv:2508.10925.
    """
    position_pair, segment_pair = _pair(positions), _pair(segment_ids)
    validate.check_axes(
        OP,
        q=(q, "BTHK"),
        k=(k, "BJGK"),
        v=(v, "BJGV"),
        query_positions=(position_pair[0], "BT"),
        key_positions=(position_pair[1], "BJ"),
        query_segment_ids=(segment_pair[0], "BT"),
        key_segment_ids=(segment_pair[1], "BJ"),
        bias=(bias, "H"),
        sinks=(sinks, "H"),
    )
    validate.check_floating(OP, q=q, k=k, v=v, bias=bias, sinks=sinks)
    validate.check_integer(OP, query_positions=position_pair[0], key_positions=position_pair[1])
    validate.check_integer(OP, query_segment_ids=segment_pair[0], key_segment_ids=segment_pair[1])
    validate.check_tokens(OP, min(q.shape[1], k.shape[1]))
    validate.check_at_least_one(OP, window=window)
    validate.check_positive(OP, logit_cap=logit_cap)
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{OP}: q has H={q.shape[2]} heads; they must be a multiple of the G={k.shape[2]} of k"
        )
    tokens, keys = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rule = Rule(causal, window, scale, keys - tokens if positions is None else None, logit_cap)
    given = (positions is not None, segment_ids is not None)
    unfit = {
        "tpu": lambda: tpu.unfit(q, k, v),
        "gpu": lambda: gpu.unfit(q, k, v),
        "splash": lambda: maintained.splash_unfit(q, k, v, bias, given[0], rule=rule),
        "cudnn": lambda: maintained.cudnn_unfit(q, k, v, bias, sinks, *given, rule=rule),
    }
    chosen = dispatch.resolve(OP, impl, unfit)
    if positions is None:
        position_pair = (jnp.arange(keys - tokens, keys)[None], jnp.arange(keys)[None])
    places = [Places(*both) for both in zip(position_pair, segment_pair, strict=True)]
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](rule, q, k, v, bias, sinks, *places)


def _pair(arrays):
    return arrays if isinstance(arrays, tuple) else (arrays, arrays)
