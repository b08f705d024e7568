"""Shapes and types of public functions are checked in tests, and only there.

Workers, and the programs that tests start, share one cache of compiled programs for the run. Nearly
all of the suite's time is compilation, so XLA compiles in its quickest way: without the expensive
passes, and without the emitter of fused loops, which alone takes two thirds. What is fused is the
same. `XLA_FLAGS= pytest ...` compiles as for users.
"""

import itertools
import os
import shutil
import tempfile

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
QUICK_COMPILATION = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
_OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="memjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
install_import_hook(["memjax", "pallas_kernels"], "checker.check")

TESTS_BETWEEN_CLEARINGS = 40
_count = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Compiled programs of hundreds of models would take all memory: drop them now and then."""
    yield
    if next(_count) % TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Users run without the shape checker of the tests; the errors of the package itself count."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_sessionfinish(session):
    if _OWN_CACHE:  # false in workers, which inherit the folder
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
