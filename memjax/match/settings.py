"""What is to agree, and how it is counted."""

import dataclasses
from typing import Literal

from memjax.config import check
from memjax.describe import count_parameters, model_flops, state_bytes, training_flops
from memjax.experiment import Experiment

By = Literal["params", "non_embedding", "state", "flops"]
UNITS = {
    "params": "parameters",
    "non_embedding": "parameters outside embeddings",
    "state": "bytes of state a sequence",
    "flops": "FLOPs a token",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Make configs agree in one quantity.

    by: parameters ("params"; "non_embedding" leaves out input and output tables), bytes of state a
        sequence, or training FLOPs a token.
    to: a number, or a config file FILE[:variant]; None is the first point of the sweep.
    change: fields to solve for, such as "model.d_model": the first alone, then with one or two of
        the others for what its steps are too coarse to meet, then the second, and so on. Empty:
        chosen here (d_model, the ratio of the MLP, sizes of the mixers; for state, sizes of the
        memory before d_model).
    tolerance: largest relative difference.
    """

    by: By = "params"
    to: float | str | None = None
    change: tuple[str, ...] = ()
    tolerance: float = 0.01

    def __post_init__(self):
        check(self, "tolerance", 0 < self.tolerance < 1, "must be in (0, 1)")
        for field in self.change:
            inside = field.startswith("model.")
            check(self, "change", inside, f"must name fields of the model, and {field} is none")
        positive = not isinstance(self.to, int | float) or self.to > 0
        check(self, "to", positive, "must be greater than 0, a config file, or none")


def quantity(experiment: Experiment, vocab_size: int, by: By) -> float:
    """What `describe` counts."""
    model = experiment.model
    if by == "state":
        return state_bytes(model, vocab_size)
    if by == "flops":
        return training_flops(model, vocab_size, experiment.data.sequence)
    counts = count_parameters(model, vocab_size)
    return counts["total" if by == "params" else "non_embedding"]


def estimate(experiment: Experiment, vocab_size: int, by: By) -> float:
    """What is quickly counted and nearly in proportion to the quantity: for FLOPs, the model's."""
    if by == "flops":
        return model_flops(experiment.model, vocab_size, experiment.data.sequence)["training"]
    return quantity(experiment, vocab_size, by)
