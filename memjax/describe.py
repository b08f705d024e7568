"""What a config costs before anything runs: parameters, state, FLOPs, memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.experiment import Experiment
from memjax.memory import MEMORIES, layer_class, make_layer_part
from memjax.memory.base import LayerMemory, SegmentMemory
from memjax.mixers.base import MemoryReport
from memjax.model import LanguageModel, Model, merge, split
from memjax.operations import count_products
from memjax.stack import make_mixer
from pallas_kernels import dispatch

TRAINING_FACTOR = 3.0
"""By definition: a backward pass does twice the operations of a forward pass."""


def parameter_shapes(config: Model, vocab_size: int) -> dict:
    """Shapes of all parameters, as nested dicts; nothing is allocated."""
    lm = nnx.eval_shape(lambda: LanguageModel(config, vocab_size, rngs=nnx.Rngs(0)))
    return split(lm)[1]


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_parameters(config: Model, vocab_size: int) -> dict[str, int]:
    """Parameters by part; `total` is their sum, `non_embedding` leaves out input and output."""
    shapes = parameter_shapes(config, vocab_size)
    parts = {"embedding": _size(shapes["embedding"]), "output": _size(shapes.get("output", {}))}
    layers = shapes["stack"]
    stacks = [layers["patterns"], *([layers["tail"]] if "tail" in layers else [])]
    for name, block in (item for stack in stacks for item in stack["blocks"].items()):
        for part, tree in block.items():
            key = f"{name.partition('_')[2]}.{part}"
            parts[key] = parts.get(key, 0) + _size(tree)
    parts["norm"] = _size(shapes["norm"])
    total = _size(shapes)
    if total != sum(parts.values()):
        parts["other"] = total - sum(parts.values())
    non_embedding = total - parts["embedding"] - parts["output"]
    return {**parts, "total": total, "non_embedding": non_embedding}


def parameter_count(config: Model, vocab_size: int) -> int:
    """All parameters."""
    return _size(parameter_shapes(config, vocab_size))


def state_bytes(config: Model, vocab_size: int) -> int:
    """Bytes of state a sequence, from the shapes of the state that the model really makes."""
    state = nnx.eval_shape(
        lambda: LanguageModel(config, vocab_size, rngs=nnx.Rngs(0)).init_state(1)
    )
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def mixer_reports(config: Model, segment: int) -> list[dict[str, Any]]:
    """State and forward FLOPs of each layer's mixer, in order."""
    reports = {}
    for name in dict.fromkeys(config.layers_in_order):
        mixer_config = config.mixer(name)
        mixer = nnx.eval_shape(
            lambda c=mixer_config: make_mixer(c, config.d_model, rngs=nnx.Rngs(0))
        )
        report = mixer.memory_report(segment)
        reports[name] = {
            "mixer": name,
            "kind": mixer_config.kind,
            "state_bytes": report.state_bytes,
            "flops_per_token": report.flops_per_token,
            "recurrence_flops": report.recurrence_flops,
        }
    return [{"layer": i, **reports[name]} for i, name in enumerate(config.layers_in_order)]


def _keeps_layers(config: Model) -> bool:
    """Whether mixers carry their states on; those of a memory of segments begin anew with each."""
    module: Any = MEMORIES[config.memory.kind][1] if config.memory else None
    return not isinstance(config.memory, SegmentMemory) or module.carries_layers


def memory_reports(config: Model, segment: int) -> list[MemoryReport | None]:
    """State and forward FLOPs of each layer's memory module; None where there is none."""
    memory, width = config.memory, config.d_model
    if isinstance(memory, LayerMemory):
        make = layer_class(memory)
        module = nnx.eval_shape(lambda: make(memory, width, rngs=nnx.Rngs(0)))
        report = module.memory_report(segment)
        places = [*range(len(config.pattern))] * config.repeat + [*range(len(config.tail))]
        return [report if memory.has(place) else None for place in places]
    part = None
    if isinstance(memory, SegmentMemory):
        part = nnx.eval_shape(lambda: make_layer_part(memory, width, rngs=nnx.Rngs(0)))
    return [None if part is None else part.memory_report()] * len(config.layers_in_order)


def flops(config: Model, vocab_size: int, segment: int) -> dict[str, float]:
    """Operations a token that the program executes in products of matrices, forward and training.

    Counted in the program itself (`memjax.operations`), so that chunks of recurrences, masked
    blocks of attention, recomputation (`remat`) and written backward passes are in it: of one
    document from its start, as plain JAX computes it. A multiply-add counts two; what is done
    element by element, and the optimizer, are not counted. Takes a second or a few of tracing.
    """
    forward = _executed(config, vocab_size, segment, lambda loss: loss)
    return {"forward": forward, "training": training_flops(config, vocab_size, segment)}


def training_flops(config: Model, vocab_size: int, segment: int) -> float:
    """`flops` of training alone."""
    return _executed(config, vocab_size, segment, jax.value_and_grad)


def _executed(
    config: Model, vocab_size: int, segment: int, program: Callable[[Callable], Callable]
) -> float:
    """Operations a token in the products of what `program` makes of a loss of parameters."""
    config = _in_plain_jax(config)
    lm = nnx.eval_shape(lambda: LanguageModel(config, vocab_size, rngs=nnx.Rngs(0)))
    definition, params = split(lm)
    tokens_BT = jax.ShapeDtypeStruct((1, segment), np.int32)

    def run(reset_BT: jax.Array, params: dict, tokens_BT: jax.Array) -> Any:
        def loss(params: dict) -> jax.Array:
            lm = merge(definition, params)
            reading = lm.read(None, tokens_BT, reset_BT)
            score = lm.score(reading.hidden_BTD, tokens_BT, jnp.ones(tokens_BT.shape))
            return score.total + reading.auxiliary

        return program(loss)(params)

    with dispatch.target("cpu"):
        return count_products(run, np.zeros((1, segment), bool), params, tokens_BT) / segment


def _in_plain_jax(config: Model) -> Model:
    """The model without kernels, whose operations cannot be seen, and with its layers in a loop."""
    mixers = {
        name: dataclasses.replace(mixer, impl="auto")  # type: ignore[call-arg]
        for name, mixer in config.mixers.items()
        if getattr(mixer, "impl", "auto") in dispatch.PLATFORM
    }
    return dataclasses.replace(config, mixers={**config.mixers, **mixers}, layers="scan")


def model_flops(config: Model, vocab_size: int, segment: int) -> dict[str, float]:
    """Operations a token of training by definition, whatever a program makes of it.

    Three times those of a forward pass: two for each weight of a matrix, for scores and sums of
    attention those of the keys that a token sees, for recurrences those of their token loop.
    `mfu_counts` leaves out the recurrences.
    """
    layers, memories = mixer_reports(config, segment), memory_reports(config, segment)
    reports = [report for report in memories if report is not None]
    replaced = isinstance(config.memory, LayerMemory) and config.memory.replaces_mlp
    mlps = len(layers) - (len(reports) if replaced else 0)
    width = config.mlp.width(config.d_model) if config.mlp else 0
    inside = mlps * 6.0 * config.d_model * width
    inside += sum(layer["flops_per_token"] for layer in layers)
    inside += sum(report.flops_per_token for report in reports)
    recurrence = sum(layer["recurrence_flops"] for layer in layers)
    recurrence += sum(report.recurrence_flops for report in reports)
    if isinstance(config.memory, SegmentMemory):
        wider = 1 + config.memory.added / config.memory.segment
        inside, recurrence = wider * inside, wider * recurrence
    forward = inside + 2.0 * config.d_model * vocab_size
    return {
        "training": TRAINING_FACTOR * forward,
        "mfu_counts": TRAINING_FACTOR * (forward - recurrence),
    }


def describe(experiment: Experiment, vocab_size: int) -> dict[str, Any]:
    """Parameters by part, state bytes a sequence by layer, FLOPs a token.

    `flops_per_token` and `forward_flops_per_token` are what the program executes (`flops`), those
    of layers are theirs by definition, as in `model_flops_per_token` (`model_flops`). What a device
    holds in memory is `memjax.footprint`'s to say.
    """
    segment = experiment.data.sequence
    parameters = count_parameters(experiment.model, vocab_size)
    layers = mixer_reports(experiment.model, segment)
    for layer, report in zip(layers, memory_reports(experiment.model, segment)):
        if not _keeps_layers(experiment.model):
            layer["state_bytes"] = 0
        if report is not None:
            layer["memory_state_bytes"] = report.state_bytes
            layer["memory_flops_per_token"] = report.flops_per_token
    operations = flops(experiment.model, vocab_size, segment)
    state = state_bytes(experiment.model, vocab_size)
    return {
        "params": parameters["total"],
        "non_embedding_params": parameters["non_embedding"],
        "parameters": parameters,
        "vocab_size": vocab_size,
        "layers": layers,
        "state_bytes_per_sequence": state,
        "flops_per_token": operations["training"],
        "forward_flops_per_token": operations["forward"],
        "model_flops_per_token": model_flops(experiment.model, vocab_size, segment)["training"],
        "tokens_per_step": experiment.data.batch * segment * experiment.train.horizon,
    }
