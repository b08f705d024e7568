"""Shapes and types of public functions are checked in tests, and only there.

Workers, and the programs that tests start, share one cache of compiled programs for the run. The
compiler's expensive passes are off: nearly all of the suite's time is compilation, and they take a
third of it. What is compiled, and fused, is the same.
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
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
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
