"""The time of a sweep against that of its points by hand: python experiments/overhead/measure.py

Three ways to train the same points, one after another on the same core:

    sweep     memjax sweep, with its folder, status files, logs and worker
    loop      one Python process that calls memjax.training.loop.train for each config, nothing else
    commands  memjax train for each config (the first COMMANDS of them, scaled up)

Each is timed whole, from the start of its process to its end. Writes results.json beside this file.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memjax.sweeps.directory import Directory

HERE = Path(__file__).parent
COMMANDS = 10
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


def timed(*command: object) -> float:
    """Seconds of a process of this Python; what it prints is left out."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - start


def measure(count: int, folder: Path) -> dict[str, float]:
    """Seconds of each way."""
    sweep = f"--sweep={HERE / 'sweep.py'}:{count}"
    warm = f"--sweep={HERE / 'sweep.py'}:1"
    timed("-m", "memjax", "sweep", warm, f"--workdir={folder / 'warm'}")  # data, compilation cache
    seconds = {"sweep": timed("-m", "memjax", "sweep", sweep, f"--workdir={folder / 'sweep'}")}
    directory = Directory(folder / "sweep")
    files = [directory.config(name) for name in directory.names()]
    seconds["loop"] = timed("-c", LOOP, folder / "loop", *files)
    each = [
        timed("-m", "memjax", "train", f"--config={f}", f"--workdir={folder / 'one' / f.stem}")
        for f in files[:COMMANDS]
    ]
    seconds["commands"] = sum(each) / len(each) * count
    inside = [directory.status(name)["seconds"] for name in directory.names()]
    return {**seconds, "inside_points": sum(inside)}


def main(count: int) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("MEMJAX_CACHE", f"{folder}/cache")
        seconds = measure(count, Path(folder))
    result = {"points": count, **{f"{name}_s": value for name, value in seconds.items()}}
    result["overhead_over_loop"] = seconds["sweep"] / seconds["loop"] - 1
    result["outside_points"] = 1 - seconds["inside_points"] / seconds["sweep"]
    print(json.dumps(result, indent=1))
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
