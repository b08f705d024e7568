"""Which implementation of an operation runs."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

logger = logging.getLogger(__name__)

NAMES = ("reference", "xla", "tpu", "gpu")

AVAILABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("reference", "xla"),
        "delta_rule": ("reference", "xla"),
        "linear_attention": ("reference", "xla"),
    }
)

_logged: set[str] = set()


def resolve(op: str, impl: str = "auto") -> str:
    """The implementation that `op` runs when called with `impl`.

    "auto" is "xla"; the first such choice for each operation is logged at INFO level.
    Raises ValueError for an unknown operation, or a name that the operation does not have.
    """
    if op not in AVAILABLE:
        raise ValueError(f"op={op!r} is not an operation; available: {', '.join(AVAILABLE)}")
    available = AVAILABLE[op]
    if impl == "auto":
        if op not in _logged:
            _logged.add(op)
            logger.info("%s: impl='auto' runs 'xla'", op)
        return "xla"
    if impl in available:
        return impl
    what = "is not available" if impl in NAMES else "is unknown"
    raise ValueError(f"{op}: impl={impl!r} {what}; use 'auto' or one of: {', '.join(available)}")
