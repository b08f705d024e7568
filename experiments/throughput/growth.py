"""How does the time of a training step grow with its tokens, and that of a token with its position?

Command:   python experiments/throughput/growth.py [--kinds=mamba,mamba2] [--json=FILE]
Hardware:  1 CPU core
Duration:  about half a minute for each kind of mixer, most of it compilation
Result:    backbones.md beside this file

One layer of each kind of backbone with its defaults and no MLP, d_model = 64, one row, float32, so
that the mixer is most of what is timed. Reported are

  slope    of log(seconds a step, forward, backward and AdamW) over log(tokens a row)
  decode   microseconds a token, token by token, after 1,000 and after 50,000 tokens were read

Seconds are processor time on one core, so that other programs on the machine change them little.
Kinds that the file already holds are not measured again.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from memjax.bench import time_decoding
from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import MIXERS, Attention
from memjax.model import LanguageModel, Model
from memjax.platform import restart_with_fast_allocator
from memjax.sharding import make_mesh
from memjax.training.step import make_trainer, put_batch

VOCABULARY = 257
RESULTS = Path(__file__).parent / "backbones/growth.json"
# Measured elsewhere, or not linear: these attend to all there is, or to what a cache holds.
OTHERS = ("all_attention", "compressive", "landmark", "memorizing", "transformer_xl")
LENGTHS = (1024, 4096, 16384)
POSITIONS = (1000, 50_000)
SETTINGS = {
    "attention": Attention(window=128)
}  # full attention is not linear, nor its state finite


def experiment(kind: str, tokens: int) -> Experiment:
    config = SETTINGS.get(kind, MIXERS[kind][0]())
    model = Model(d_model=64, pattern=(kind,), repeat=1, mixers={kind: config}, mlp=None)
    return Experiment(model=model, data=Data(sequence=tokens, batch=1))


def step_seconds(kind: str, tokens: int, repeats: int = 3) -> float:
    """Processor time of a training step on random tokens: the median."""
    wanted = experiment(kind, tokens)
    mesh = make_mesh(wanted.mesh, 1)
    trainer = make_trainer(wanted, VOCABULARY, mesh)
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, (1, tokens + 1))
    batch = {
        "tokens_BT": drawn[:, :-1].astype(np.int32),
        "targets_BT": drawn[:, 1:].astype(np.int32),
        "weight_BT": np.ones((1, tokens), np.float32),
        "reset_BT": np.arange(tokens)[None] == 0,
    }
    batch, state, times = put_batch(batch, mesh), trainer.init(), []
    for _ in range(1 + repeats):
        begin = time.process_time()
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.process_time() - begin)
    return statistics.median(times[1:])


def measure(kind: str) -> dict:
    seconds = [step_seconds(kind, tokens) for tokens in LENGTHS]
    slope = np.polyfit(np.log(LENGTHS), np.log(seconds), 1)[0]
    lm = LanguageModel(experiment(kind, 1000).model, VOCABULARY, rngs=nnx.Rngs(0))
    rates = time_decoding(lm, VOCABULARY, POSITIONS, clock=time.process_time)
    return {
        "lengths": LENGTHS,
        "seconds_per_step": seconds,
        "slope": float(slope),
        "decode_seconds_per_token": {r["position"]: 1 / r["tokens_per_s"] for r in rates},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    kinds = [kind for kind in MIXERS if kind not in OTHERS]
    parser.add_argument("--kinds", default=",".join(kinds))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.json.parent.mkdir(exist_ok=True)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for kind in options.kinds.split(","):
        if kind in results:
            continue
        results[kind] = measure(kind)
        first, last = (1e6 * s for s in results[kind]["decode_seconds_per_token"].values())
        print(
            f"{kind:20} slope {results[kind]['slope']:.2f}  decode {first:.0f} and {last:.0f} us",
            flush=True,
        )
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    restart_with_fast_allocator()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main()
