"""Programs within the operations of traced programs."""

from collections.abc import Sequence
from typing import Any


def called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The program that an operation runs once, and its constants; None if it runs none."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = eqn.params.get(key)
        if found is not None and not isinstance(found, tuple | list):
            return (found.jaxpr, found.consts) if hasattr(found, "consts") else (found, ())
    return None
