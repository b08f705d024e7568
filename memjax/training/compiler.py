"""Options of the compiler, in one place."""

import functools

import jax

CPU_OPTIONS = {"xla_cpu_prefer_vector_width": "512"}


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """Options for `jax.jit` on this platform; None where there is none to give."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except Exception:  # each version of XLA has its own error for an option that it lacks
        return None
    return CPU_OPTIONS
