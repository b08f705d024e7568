"""The time of a sweep against that of its points by hand: python experiments/overhead/measure.py

Three ways to train the same points, one after another on the same core:

    sweep     memjax sweep, with its folder, status files, logs and worker
    loop      one Python process that calls memjax.training.loop.train for each config, nothing else
    commands  memjax train for each config (the first COMMANDS of them, scaled up)

Each is timed whole, from the start of its process to its end. Writes results.json beside this file.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from memjax.sweeps.directory import Directory

HERE = Path(__file__).parent
COMMANDS = 5
LOOP = """
import sys
from pathlib import Path
from memjax.config import build, load_file
from memjax.experiment import Experiment
from memjax.platform import enable_compilation_cache
from memjax.training.loop import train
enable_compilation_cache()
for file in sys.argv[2:]:
    train(build(Experiment, load_file(file)), Path(sys.argv[1]) / Path(file).stem)
"""


class Time(NamedTuple):
    """Seconds by the clock, and of processors (this process and those it started)."""

    wall: float
    cpu: float


def timed(*command: object) -> Time:
    """The time of a process of this Python; what it prints is left out."""
    start, before = time.perf_counter(), _cpu()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return Time(time.perf_counter() - start, _cpu() - before)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(count: int, folder: Path) -> dict[str, Time]:
    """The time of each way."""
    sweep = f"--sweep={HERE / 'sweep.py'}:{count}"
    warm = f"--sweep={HERE / 'sweep.py'}:1"
    timed("-m", "memjax", "sweep", warm, f"--workdir={folder / 'warm'}")  # data, compilation cache
    found = {"sweep": timed("-m", "memjax", "sweep", sweep, f"--workdir={folder / 'sweep'}")}
    directory = Directory(folder / "sweep")
    files = [directory.config(name) for name in directory.names()]
    found["loop"] = timed("-c", LOOP, folder / "loop", *files)
    each = [
        timed("-m", "memjax", "train", f"--config={f}", f"--workdir={folder / 'one' / f.stem}")
        for f in files[:COMMANDS]
    ]
    found["commands"] = Time(*(sum(kind) * count / len(each) for kind in zip(*each)))
    return found


def main(count: int) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("MEMJAX_CACHE", f"{folder}/cache")
        found = measure(count, Path(folder))
    result: dict[str, object] = {"points": count, "cores": len(os.sched_getaffinity(0))}
    for name, time_of in found.items():
        result[name] = {"wall_s": round(time_of.wall, 2), "cpu_s": round(time_of.cpu, 2)}
    for kind in ("wall", "cpu"):
        ratio = getattr(found["sweep"], kind) / getattr(found["loop"], kind)
        result[f"overhead_over_loop_{kind}"] = round(ratio - 1, 4)
    print(json.dumps(result, indent=1))
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
