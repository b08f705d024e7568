"""Options of the compiler, in one place."""

import functools

import jax

from pallas_kernels.dispatch import current_target

CPU_OPTIONS = {"xla_cpu_prefer_vector_width": "512"}


def compiler_options() -> dict[str, str] | None:
    """Options for `jax.jit` on the platform that is compiled for; None where there is none."""
    return _cpu_options() if current_target().platform == "cpu" else None


@functools.cache
def _cpu_options() -> dict[str, str] | None:
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except Exception:  # each version of XLA has its own error for an option that it lacks
        return None
    return CPU_OPTIONS
