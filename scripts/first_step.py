"""Time from the start of a process to the end of its first training step; see `bench_step.py`."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE = f"{ROOT}/configs/lm.py"
Row = dict[str, Any]


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def first_step(size: str, repeats: int, flags: tuple[str, ...] = ()) -> list[Row]:
    """A cold start, then starts that find what it has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        times = [_start(size, Path(folder), i, flags) for i in range(1 + repeats)]
    cold, cached = times[:1], times[1:]
    return [
        {
            "row": f"first_step {name}",
            "what": f"{size}, the page's own mesh",
            "value": spread([wall for wall, _ in values]),
            "cpu": spread([cpu for _, cpu in values]),
        }
        for name, values in (("cold", cold), ("cached", cached))
    ]


def _start(size: str, folder: Path, number: int, flags: tuple[str, ...]) -> tuple[float, float]:
    """Seconds and processor seconds to the first step of a process, which is then stopped."""
    command = [
        sys.executable, "-m", "moejax", "train", f"--config={PAGE}:size={size}", *flags,
        f"--workdir={folder}/run{number}",
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"):
        environment.pop(name, None)
    began = time.perf_counter()
    # In ROOT, for `python -m` looks there before anywhere else.
    options: Any = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("compiled, first step done"):
                seconds, cpu = time.perf_counter() - began, _cpu_seconds(process.pid)
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended without a step")
        process.send_signal(signal.SIGTERM)  # it saves, and keeps what it compiled
        process.stdout.read()
    return seconds, cpu


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process so far; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
