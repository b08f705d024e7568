"""Settings of the compiler, in one place."""

import functools
import os
from pathlib import Path

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


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, under $XDG_CACHE_HOME/memjax/jax.

    JAX_COMPILATION_CACHE_DIR, if set, names another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "memjax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
