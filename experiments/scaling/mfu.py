"""Model FLOPs utilisation of the 340M configs on one accelerator.

    python experiments/scaling/mfu.py --json=experiments/scaling/mfu.json [NAME ...]

Each config trains in bfloat16 on random tokens of its own sequence length, 16,384 tokens a step,
with its own remat. All are compiled side by side, each in a process, then timed one after the
other. `mfu` is defined in `memjax.bench`: the work of recurrences is not counted, and the roof is
that of a large matrix product in the same process.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("attention_340m", "retnet_340m", "gla_340m", "deltanet_340m", "mamba2_370m")
VOCAB, TOKENS = 32_000, 16_384

# Products by cuBLAS as it chooses: a search among kernels takes longer than the measurement, and
# the memory that several searches keep leaves none for the steps.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def load(name: str, tokens: int):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = module.get_config()
    rows = max(1, tokens // experiment.data.sequence)
    data = dataclasses.replace(experiment.data, batch=rows)
    return dataclasses.replace(
        experiment, data=data, train=dataclasses.replace(experiment.train, accumulate=1)
    )


def child(name: str, tokens: int, seconds: float) -> None:
    """Compile, say so, wait for a line, time, print the result."""
    import jax

    from memjax.bench import time_training

    def wait() -> None:
        print("compiled", flush=True)
        sys.stdin.readline()

    experiment = load(name, tokens)
    found = time_training(experiment, VOCAB, seconds, wait)
    result = {"device": jax.devices()[0].device_kind, "sequence": experiment.data.sequence}
    print(json.dumps(result | found), flush=True)


class Child:
    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.compiled = name, threading.Event()
        self.errors = open(f"{arguments.logs}/{name}.log", "w+")  # noqa: SIM115
        command = [sys.executable, __file__, "--child", name, f"--seconds={arguments.seconds}"]
        self.process = subprocess.Popen(
            [*command, f"--tokens={arguments.tokens}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": FLAGS},
        )
        threading.Thread(target=self._first_line, daemon=True).start()

    def _first_line(self) -> None:
        self.process.stdout.readline()
        self.compiled.set()

    def result(self, limit: float) -> dict:
        """Wait for it to compile, no longer than `limit` on the clock; then let it run alone."""
        if not self.compiled.wait(max(0.0, limit - time.time())):
            self.process.kill()
            return {"name": self.name, "error": "not compiled in time"}
        try:
            out, _ = self.process.communicate("go\n", timeout=60)
            return {"name": self.name, **json.loads(out.splitlines()[-1])}
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
            self.process.kill()
            self.errors.seek(0)
            return {
                "name": self.name,
                "error": (self.errors.read().strip().splitlines() or [""])[-1],
            }


def show(row: dict) -> str:
    if "error" in row:
        return f"| {row['name']} | failed: {row['error']} |"
    return (
        f"| {row['name']} | {row['sequence']:,} | {row['train_tokens_per_s']:,.0f} "
        f"| {row['mfu']:.3f} | {row['peak_bytes'] / 2**30:.1f} | {row['compile_s']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, each")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a step")
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds for all of them")
    parser.add_argument("--logs", default="/tmp", help="folder for what the processes say")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.tokens, arguments.seconds)
        return
    limit = time.time() + arguments.compile_limit
    children = [Child(name, arguments) for name in arguments.names]
    for one in children:
        one.compiled.wait(max(0.0, limit - time.time()))
    print(
        "| config | sequence | tokens/s | mfu | peak GiB | compile s |\n|---|---|---|---|---|---|"
    )
    rows = []
    for one in children:
        rows.append(one.result(limit))
        print(show(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
