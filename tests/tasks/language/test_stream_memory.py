"""The memory that a stream takes does not grow with the text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.environment import of_a_user

pytestmark = pytest.mark.slow

MIB = 1 << 20
READ = """
import resource, sys
from moejax.config import default
from moejax.tasks.language.task import build

config = default()
config.train.update({"seq_len": 1024, "batch_size": 64, "eval_rows": 64})
config.data.update({"path": sys.argv[1], "stream": True})
source = build(config)[1]
step = 0
while source.position(step)[0] == 0:  # one epoch
    source.train_batch(step)
    step += 1
print(step, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write(path: Path, size: int) -> None:
    """JSON lines of ``size`` bytes: documents of 200 bytes to 400 kB, most of them short."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        while file.tell() < size:
            text = f"{file.tell()} " * int(30 * 2 ** rng.uniform(0, 11))
            file.write(json.dumps({"text": text}) + "\n")


def read(path: Path) -> tuple[int, int]:
    """Steps of an epoch, and the most bytes that the process ever held."""
    ended = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env=of_a_user(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    steps, most = map(int, ended.stdout.split())
    return steps, most


def test_a_text_ten_times_as_long_takes_the_same_memory(tmp_path: Path):
    """30 and 300 MiB; in memory, the tokens alone would take 540 MiB more."""
    write(tmp_path / "short.jsonl", 30 * MIB)
    write(tmp_path / "long.jsonl", 300 * MIB)
    (few, short), (many, long) = read(tmp_path / "short.jsonl"), read(tmp_path / "long.jsonl")
    assert 9 < many / few < 11
    assert abs(long - short) < 24 * MIB, (short / MIB, long / MIB)  # three blocks
