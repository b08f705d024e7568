"""Shapes and types of public functions are checked in tests, and only there."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
install_import_hook(["memjax", "pallas_kernels"], "checker.check")
