"""What `memjax match` does."""

from typing import Any

from memjax.config import ConfigError, build, to_dict, to_json
from memjax.data import load_tokenizer
from memjax.experiment import Experiment
from memjax.match.search import match
from memjax.match.settings import By, Match, quantity


def run_match(
    experiment: Experiment,
    to: float | Experiment,
    *,
    by: By = "params",
    change: tuple[str, ...] = (),
    tolerance: float = 0.01,
    save: str | None = None,
) -> dict[str, Any]:
    """Solve, and save the config as JSON if a file is named.

    Raises ConfigError, one line, if no values of the fields meet the target.
    """
    settings = build(Match, {"by": by, "change": change, "tolerance": tolerance}, "match")
    vocab_size = load_tokenizer(experiment.data).vocab_size
    if isinstance(to, Experiment):
        target = quantity(to, load_tokenizer(to.data).vocab_size, by)
    else:
        target = build(Match, {"to": to}, "match").to
    found = match(experiment, vocab_size, target, settings)
    if save is not None:
        _save(found.experiment, save)
    return {
        "by": by,
        "target": found.target,
        "before": found.before,
        "after": found.value,
        "difference": found.value / found.target - 1,
        "changed": {f"config.{key}": list(pair) for key, pair in found.changed.items()},
        "arguments": [f"--config.{key}={new}" for key, (_, new) in found.changed.items()],
        "config": to_dict(found.experiment),
        "saved": save,
    }


def _save(experiment: Experiment, file: str) -> None:
    if not file.endswith(".json"):
        raise ConfigError(f"--save={file}: must end in .json")
    try:
        with open(file, "w") as out:
            out.write(to_json(experiment))
    except OSError as error:
        raise ConfigError(f"--save={file}: cannot be written ({error.strerror})") from None
