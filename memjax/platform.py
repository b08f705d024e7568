"""Process settings that make JAX fast on this machine; called once by the command line."""

import os
import platform
import sys
from pathlib import Path

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "100000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def restart_with_fast_allocator() -> None:
    """Restart the process with settings of glibc's allocator that are read at its start.

    A training step on a CPU otherwise gives its buffers back and faults them in again, which costs
    a third of its time. Peak memory can double. Set MEMJAX_ALLOCATOR=default to leave it alone;
    variables that are set already are not touched.
    """
    wanted = os.environ.get("MEMJAX_ALLOCATOR", "fast")
    done = all(name in os.environ for name in ALLOCATOR)
    if wanted != "fast" or done or platform.libc_ver()[0] != "glibc" or not sys.orig_argv:
        return
    environment = {**ALLOCATOR, **os.environ}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def cache_folder() -> Path:
    """Where memjax keeps what can be made again: $MEMJAX_CACHE, or memjax in the user's cache."""
    if os.environ.get("MEMJAX_CACHE"):
        return Path(os.environ["MEMJAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "memjax"


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user chose a folder for JAX already."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder().expanduser() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
