"""An experiment: everything a run needs, in one typed config."""

import dataclasses

from memjax.config import FieldError
from memjax.data.config import Data
from memjax.evals.config import Eval
from memjax.model import Model
from memjax.sharding import Mesh
from memjax.training.config import Checkpoint, Optimizer, Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The root of the config tree; a config file's `get_config()` returns one."""

    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()

    def __post_init__(self):
        if self.train.carry and self.data.stream != "documents":
            raise FieldError(
                "train.carry",
                True,
                'needs data.stream="documents": packed windows do not continue a document',
            )
        if self.data.batch % self.train.accumulate:
            raise FieldError(
                "train.accumulate",
                self.train.accumulate,
                f"must divide data.batch={self.data.batch}",
            )
