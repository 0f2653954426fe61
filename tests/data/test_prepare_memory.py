"""Memory of a preparation does not grow with its text.

Units and chunks are a thirtieth of their usual size here, so that a text of 40 MB is to them what
one of a gigabyte is to the program. Memory is what a process has for itself: pages of mapped files,
which the system takes back when it needs them, do not count.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, threading, time
from moejax.data import encode, prepare, token_overlap, units
from moejax.data import duplicates
from moejax.data.load import Wanted, training_pieces

units.UNIT = encode.CHUNK = 1 << 20
encode.BATCH = 1 << 19
for module in (duplicates, token_overlap):
    module.MOST_TRAIN, module.MOST_HELDOUT, module.STRETCH = 1 << 20, 1 << 17, 1 << 17
peak, over = 0, threading.Event()

def own():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, own())

before = own()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
path, out = sys.argv[1:]
if out:
    prepare.prepare(path, "", out)
else:
    assert sum(len(piece.data) for piece in training_pieces(Wanted(path))) > 1 << 20
over.set()
watcher.join()
print(before, peak)
"""


def write(folder: Path, megabytes: int) -> None:
    block = os.urandom(1 << 19).hex()
    with open(folder / "text.jsonl", "w") as records, open(folder / "text.txt", "w") as plain:
        for number in range(megabytes * 500):
            at = number * 7919 % (len(block) - 2100)
            text = f"{number} {block[at : at + 2048]}"
            records.write(json.dumps({"text": text}) + "\n")
            plain.write(text + "\n")
    with open(folder / "text.jsonl", "rb") as source, open(folder / "text.zst", "wb") as target:
        zstandard.ZstdCompressor(level=1).copy_stream(source, target)
    (folder / "text.zst").rename(folder / "packed.jsonl.zst")


def peak(path: Path, out: str) -> float:
    """The most MiB that the program had while it ran, beside what it had at the start."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), out],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, most = map(float, done.stdout.split())
    assert before < most
    return most


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["text.jsonl", "packed.jsonl.zst", "text.txt"])
@pytest.mark.parametrize("what", ["prepare", "tokenizer"])
def test_memory_of_a_text_ten_times_as_long_is_about_the_same(tmp_path, name, what):
    found = []
    for megabytes in (4, 40):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        write(folder, megabytes)
        found.append(peak(folder / name, str(folder / "out") if what == "prepare" else ""))
    # 20,000 documents have 100 bytes each; 40 MB more would be seen.
    assert found[1] < 1.15 * found[0] + 5, found
