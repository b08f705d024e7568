"""Memory modules that attach to any backbone, by kind: `MEMORIES[kind] = (Config, Module)`.

None is built yet; `model.memory` must be None.
"""

from memjax.memory.base import MemoryConfig

MEMORIES: dict[str, tuple[type[MemoryConfig], type]] = {}
