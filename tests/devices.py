"""Tests that need several devices: run in a process of their own, on eight virtual CPUs."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DEVICES = 8


def run_on_virtual_devices(name: str, *choose: str) -> None:
    """Run the tests of `tests/on_devices/<name>.py`; their report is this test's.

    choose: arguments of pytest.
    """
    flags = os.environ["XLA_FLAGS"]  # quick compilation, from conftest.py
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={DEVICES}",
        # Threads: a simulated device that waits for another holds one.
        "NPROC": "32",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [str(HERE / "on_devices" / f"{name}.py"), *choose]
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
