"""The base of the configs of memory modules."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Base of the configs of memory modules; `kind` is the key in `MEMORIES`."""

    kind: ClassVar[str]
