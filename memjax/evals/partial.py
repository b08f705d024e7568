"""An evaluation that was stopped: what it had scored, and the state from which it goes on.

eval/.<name of the result>.part is a file of arrays. It goes when the evaluation is finished, and
is good only for the same weights, text and lanes.
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax import __version__
from memjax.evals.totals import Totals
from memjax.training.arrays import describe, flatten, unflatten
from memjax.training.digest import digests
from memjax.training.signals import Stop
from memjax.training.workdir import write_atomically

SAVE_EVERY_S = 300.0
SUMS = ("nats", "tokens", "bucket_nats", "bucket_tokens")


class Scored(NamedTuple):
    """How far an evaluation is: whole batches, their sums, the state after them, seconds.

    state: None before the first batch.
    """

    batches: int
    totals: Totals
    state: Any
    seconds: float


class Partial:
    """The file of an evaluation in progress. `tokens` were scored by earlier calls."""

    def __init__(self, path: Path, stop: Stop, params: Any, settings: Mapping[str, Any]):
        """stop: whether to save and end. params: the weights.

        settings: what else decides what is in a batch, as JSON values.
        """
        self.path, self.stop = path, stop
        flat = flatten(params)
        weights = [sorted(describe(flat).items()), np.asarray(digests(flat)).tolist()]
        told = [__version__, weights, dict(settings)]
        self.digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self._saved = self._read()
        self.tokens = int(self._saved["tokens"].sum()) if self._saved else 0
        self._last = time.monotonic()

    def _read(self) -> dict[str, np.ndarray]:
        """The arrays of the file; none if there is no file, or one of another evaluation."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                saved = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return {}
        return saved if str(saved.get("digest")) == self.digest else {}

    def begin(self, documents: int, shapes: Any) -> Scored:
        """Where to go on. shapes: of the state, as jax.eval_shape gives them."""
        totals = Totals(documents)
        if not self._saved:
            return Scored(0, totals, None, 0.0)
        for name in SUMS:
            setattr(totals, name, self._saved[name])
        flat = {
            name: jnp.asarray(self._saved[f"state/{name}"].view(leaf.dtype).reshape(leaf.shape))
            for name, leaf in flatten(shapes).items()
        }
        batches, seconds = int(self._saved["batches"]), float(self._saved["seconds"])
        self._saved = {}
        return Scored(batches, totals, unflatten(shapes, flat), seconds)

    def is_due(self, batches: int) -> bool:
        """Whether to save now: a signal came, or a crash would lose too much."""
        late = time.monotonic() - self._last > SAVE_EVERY_S
        return batches > 0 and (late or self.stop.after(batches) is not None)

    def save(self, scored: Scored) -> None:
        """Replace the file. Raises ConfigError, one line, if it cannot be written."""
        arrays = {name: getattr(scored.totals, name) for name in SUMS}
        arrays |= {"digest": np.array(self.digest), "batches": np.array(scored.batches)}
        arrays["seconds"] = np.array(scored.seconds)
        for name, leaf in flatten(scored.state).items():  # NumPy cannot save every type
            arrays[f"state/{name}"] = np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)
        self.path.parent.mkdir(exist_ok=True)
        write_atomically(self.path, file.getvalue())
        self._last = time.monotonic()

    def clear(self) -> None:
        """The evaluation is finished: remove the file."""
        self.path.unlink(missing_ok=True)
