"""Names that differ between the versions of JAX supported, in one place."""

from typing import Any

import jax
from jax.experimental.pallas import tpu


def like(shape: tuple[int, ...], dtype: Any, array: jax.Array) -> jax.ShapeDtypeStruct:
    """The output of a kernel, varying over the mesh axes that `array` varies over.

    Without it `jax.shard_map` refuses a kernel, unless its check is switched off.
    """
    kind = jax.typeof(array)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)


def tpu_interpreter(**settings: Any) -> Any:
    """The interpreter that simulates memory, copies and semaphores of a TPU, and finds races."""
    return tpu.InterpretParams(**settings)


def gpu_interpreter(**settings: Any) -> Any:
    """The interpreter of Mosaic GPU kernels: private in JAX 0.10, public from 0.11."""
    if jax.__version_info__ < (0, 11):
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams(**settings)
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(**settings)  # type: ignore[attr-defined]


def gpu_load(ref: Any, layout: Any) -> jax.Array:
    """Memory to registers in a Mosaic GPU kernel; until JAX 0.11 an index had to be named."""
    from jax.experimental.pallas import mosaic_gpu

    index: tuple[Any, ...] = ((),) if jax.__version_info__ < (0, 11) else ()
    return mosaic_gpu.load(ref, *index, layout=layout, optimized=False)


def tpu_races_found() -> bool:
    """Whether the last kernel run with `tpu_interpreter(detect_races=True)` had a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and bool(races.races_found)


def reset_tpu_interpreter() -> None:
    """Forget what an interrupted kernel left behind."""
    tpu.reset_tpu_interpret_mode_state()


def abstract_tpu(kind: str = "TPU v5 lite") -> jax.sharding.AbstractMesh:
    """A mesh without axes on a TPU that is not there, to lower kernels for it."""
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(kind, 1, "tpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def vary_like(tree: Any, array: jax.Array) -> Any:
    """Arrays marked as different on the devices where `array` is, as `jax.shard_map` checks."""
    wanted = jax.typeof(array).manual_axis_type.varying

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(wanted - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
