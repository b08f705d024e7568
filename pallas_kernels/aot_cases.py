"""Calls of the operations that are compiled for one platform alone, for `pallas_kernels.aot`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attention, diagonal_scan, neural_memory, taylor_attention
from pallas_kernels import ttt_linear as linear
from pallas_kernels import ttt_mlp as mlp
from pallas_kernels.neural_memory import (
    KL,
    L2,
    MLP,
    DotProduct,
    ElasticNet,
    GatedMLP,
    GradientDescent,
    Huber,
    LinearMap,
    Lp,
    Lq,
    Mirror,
    Momentum,
    Nesterov,
    Robust,
    WeightDecay,
)
from pallas_kernels.ttt import LinearMemory, MLPMemory, Norm

BATCH, TOKENS, HEADS = 1, 256, 2
Case = tuple[str, Callable[..., Any], dict[str, Any]]

TITANS = dict(structure=MLP(), bias=L2(), retention=WeightDecay(), learner=Momentum())
RULES: dict[str, dict[str, Any]] = {
    "titans": TITANS,
    "linear": TITANS | dict(structure=LinearMap(), learner=GradientDescent()),
    "moneta": TITANS | dict(bias=Lp(power=3), retention=Lq(), learner=GradientDescent()),
    "yaad": TITANS | dict(bias=Huber(), learner=GradientDescent()),
    "memora": TITANS | dict(retention=KL(), learner=GradientDescent()),
    "gated robust nesterov": TITANS | dict(structure=GatedMLP(), bias=Robust(), learner=Nesterov()),
    "hebb mirror": TITANS | dict(structure=LinearMap(), bias=DotProduct(), retention=Mirror()),
    "three layers elastic": TITANS
    | dict(structure=MLP(layers=3, residual_norm=False), retention=ElasticNet()),
}


def tpu_cases() -> Iterator[Case]:
    """Name, a call of keyword arguments that gives floating arrays, and their shapes."""
    bf16, f32 = jnp.bfloat16, jnp.float32
    for size, kind in ((64, f32), (128, bf16)):
        for block in (16, 64):
            args = _ttt(linear, size, kind, block)
            yield f"ttt_linear K={size} C={block} {kind.__name__}", _floats(linear), args
        yield f"ttt_mlp K={size} C=16 {kind.__name__}", _floats(mlp), _ttt(mlp, size, kind, 16)
    for name, rule in RULES.items():
        yield f"neural_memory {name} K=64", _memory(rule, 16), _streams(rule, 64, bf16)
    yield "neural_memory titans K=64 C=64", _memory(TITANS, 64), _streams(TITANS, 64, f32)
    large = TITANS | dict(structure=MLP(layers=3))  # as much VMEM as is taken
    yield "neural_memory three layers K=128", _memory(large, 16), _streams(large, 128, f32)
    for channels in (256, 384, 1024, 2560):
        args = {name: _shape(f32, BATCH, TOKENS, channels) for name in ("x", "log_decay")}
        args["reset"] = _shape(jnp.bool_, BATCH, TOKENS)
        yield f"diagonal_scan E={channels}", diagonal_scan, args
    for kind in (f32, bf16):
        args = {n: _shape(kind, BATCH, TOKENS, HEADS, s) for n, s in zip("qkv", (16, 16, 64))}
        args["reset"] = _shape(jnp.bool_, BATCH, TOKENS)
        yield f"taylor_attention K=16 V=64 {kind.__name__}", taylor_attention, args
    for kind in (f32, bf16):
        args = {n: _shape(kind, BATCH, TOKENS, h, 128) for n, h in zip("qkv", (4, 2, 2))}
        args["sinks"] = _shape(f32, 4)
        yield f"attention cap and sinks {kind.__name__}", _capped, args


def gpu_cases() -> Iterator[Case]:
    """The same, for a Hopper GPU."""
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    for size in (64, 128):
        sizes = zip("qkv", (4, 2, 2))
        args = {n: _shape(bf16, BATCH, 4 * TOKENS, heads, size) for n, heads in sizes}
        ids = {"segment_ids": _shape(i32, BATCH, 4 * TOKENS)}
        yield f"attention documents K={size}", attention, args | ids
        yield f"attention cap and sinks K={size}", _capped, args | {"sinks": _shape(f32, 4)}
        window = functools.partial(attention, window=300)
        yield f"attention slopes in a window K={size}", window, args | {"bias": _shape(f32, 4)}


def _capped(*, impl: str, **args: Any) -> jax.Array:
    return attention(**args, logit_cap=50.0, impl=impl)


def _shape(kind: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, kind)


def _floats(op: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """The op, without the integers of its state."""

    def call(*, impl: str, **args: Any) -> list[jax.Array]:
        out = jax.tree.leaves(op(**args, **settings, impl=impl))
        return [x for x in out if jnp.issubdtype(x.dtype, jnp.floating)]

    return call


def _memory(rule: dict[str, Any], update_every: int) -> Callable[..., Any]:
    return _floats(neural_memory, **rule, update_every=update_every)


def _ttt(op: Callable[..., Any], size: int, kind: Any, block: int) -> dict[str, Any]:
    f32, hidden = jnp.float32, 2 * size
    args: dict[str, Any] = {name: _shape(kind, BATCH, TOKENS, HEADS, size) for name in "qkv"}
    args["rate"] = _shape(f32, BATCH, TOKENS, HEADS)
    args["place_rate"] = _shape(f32, block)
    args["norm"] = Norm(_shape(f32, HEADS, size), _shape(f32, HEADS, size))  # type: ignore[arg-type]
    shapes: tuple[tuple[int, ...], ...] = ((size, hidden), (hidden,), (hidden, size), (size,))
    memory: Any = MLPMemory
    if op is linear:
        shapes, memory = ((size, size), (size,)), LinearMemory
    args["memory"] = memory(*(_shape(f32, HEADS, *shape) for shape in shapes))
    args["reset"] = _shape(jnp.bool_, BATCH, TOKENS)
    return args


def _streams(rule: dict[str, Any], size: int, kind: Any) -> dict[str, Any]:
    args: dict[str, Any] = {name: _shape(kind, BATCH, TOKENS, HEADS, size) for name in "qkv"}
    gates = ["rate", "log_keep"]
    gates += ["log_momentum"] if rule["learner"].momentum else []
    gates += ["threshold"] if rule["bias"].needs_threshold else []
    args |= {name: _shape(jnp.float32, BATCH, TOKENS, HEADS) for name in gates}
    structure = rule["structure"]
    args["weights"] = tuple(
        _shape(jnp.float32, HEADS, *pair) for pair in structure.shapes(size, size)
    )
    names = structure.constants(size)
    args["constants"] = {name: _shape(jnp.float32, HEADS, size) for name in names}
    args["reset"] = _shape(jnp.bool_, BATCH, TOKENS)
    return args
