"""Benchmark of data: python scripts/bench_data.py --out FILE [--mib N] [--rounds R] [--quick]

From documents in a file of JSON lines to batches, on CPU:

* preparing: MB/s and tokens/s from text to shards, as bytes and with a byte-level BPE, beside the
  library `datasets` with the same tokenizer on the same file (``load_dataset`` and ``map``,
  batched, one process each, their own cache emptied; both use the tokenizer's threads).
* reading: tokens/s of batches, from prepared shards (windows, and packed documents) and from a
  stream, over the tokens/s that training consumes on this machine: the default run on one device.
* memory: the largest resident size of `moejax data prepare`, and of a stream that is read nearly
  to its end, on this file and on one ten times larger.

Pairs are measured in turns, A B, B A, A B; numbers are medians over the rounds, with quartiles.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moejax.config import apply_overrides, default
from moejax.data.builtin import builtin_documents
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.stream import open_stream

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, BATCH, VOCAB = 1024, 32, 8192
TRAIN = (
    "--config=configs/lm.py",
    "--config.mesh.cpu_devices=1",
    "--config.mesh.expert=1",
    "--config.train.eval_rows=1",
)

Row = dict[str, Any]


def write_text(path: Path, mib: int) -> None:
    """JSON lines of about ``mib`` MiB: paragraphs of Python's library, each with its own number, so
    that no two documents are equal."""
    sources = [document.read().decode("utf-8", "replace") for document in builtin_documents()]
    size, number = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < mib << 20:
            for text in sources:
                for begin in range(0, len(text), 4000):
                    number += 1
                    line = json.dumps({"text": f"{number}\n{text[begin : begin + 4000]}"})
                    file.write(line + "\n")
                    size += len(line)
                if size >= mib << 20:
                    break


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {"median": middle, "low": low, "high": high}


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    return time.perf_counter() - begin


def preparing(text: Path, bpe: Path, folder: Path, rounds: int) -> list[Row]:
    """Seconds of preparing the file: ours as bytes, ours with the BPE, and theirs."""
    size, found = text.stat().st_size, {}

    def ours(tokenizer: str) -> Callable[[], None]:
        def work() -> None:
            shutil.rmtree(folder / "shards", ignore_errors=True)
            index = prepare(str(text), tokenizer, str(folder / "shards"))
            found[tokenizer] = index.train_tokens + index.heldout_tokens

        return work

    def theirs() -> None:
        import datasets
        import transformers

        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe))
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            lines = datasets.load_dataset(
                "json", data_files=str(text), split="train", cache_dir=cache
            )
            lines.map(
                lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]},
                batched=True,
                remove_columns=lines.column_names,
            )

    works = {"bytes": ours(""), "bpe": ours(str(bpe)), "datasets": theirs}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in list(works)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(works[name]))
    rows: list[Row] = []
    for name, values in times.items():
        tokens = found["" if name == "bytes" else str(bpe)]
        rows.append(
            {
                "what": "prepare",
                "way": name,
                "mb_per_s": quartiles([size / 1e6 / x for x in values]),
                "tokens_per_s": quartiles([tokens / x for x in values]),
            }
        )
    ratio = [a / b for a, b in zip(times["datasets"], times["bpe"], strict=True)]
    rows.append({"what": "prepare", "way": "bpe over datasets", "ratio": quartiles(ratio)})
    return rows


def reading(text: Path, shards: Path, bpe: Path, rounds: int, consumed: float) -> list[Row]:
    """Tokens/s of batches, and how many times more that is than training consumes."""
    stream = default()
    apply_overrides(
        stream,
        [
            f"data.path={text}",
            "data.stream=True",
            f"data.tokenizer={bpe}",
            f"train.seq_len={SEQ_LEN}",
            f"train.batch_size={BATCH}",
            "train.eval_rows=16",
        ],
    )
    corpus = load_corpus(str(shards))
    sources = {
        "shards, windows": lambda: TextSource(corpus, SEQ_LEN, BATCH, 0, 16),
        "shards, best_fit": lambda: TextSource(corpus, SEQ_LEN, BATCH, 0, 16, packing="best_fit"),
        "stream": lambda: open_stream(stream),
    }
    times: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(rounds):
        for name in list(sources)[:: 1 if turn % 2 == 0 else -1]:
            source = sources[name]()
            source.train_batch(0)  # what is made once
            steps = 200 if name != "stream" else 64
            elapsed = seconds(lambda s=source, n=steps: [s.train_batch(i + 1) for i in range(n)])
            times[name].append(steps * BATCH * SEQ_LEN / elapsed)
    return [
        {
            "what": "read",
            "way": name,
            "tokens_per_s": quartiles(rates),
            "over_training": quartiles([rate / consumed for rate in rates]),
        }
        for name, rates in times.items()
    ]


def training(folder: Path, steps: int) -> float:
    """Tokens/s that the default run consumes on one device."""
    command = [sys.executable, "-m", "moejax", "train", *TRAIN]
    command += [f"--config.train.steps={steps}", f"--workdir={folder / 'run'}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(x) for x in (folder / "run" / "timings.jsonl").read_text().splitlines()]
    return float(rows[-1]["tokens_per_second"])


MEASURED = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
kind, path, out = sys.argv[1:]
if kind == "prepare":
    from moejax.data.prepare import prepare
    prepare(path, "", out)
else:
    from moejax.config import apply_overrides, default
    from moejax.tasks.language.stream import open_stream
    config = default()
    fields = [f"data.path={{path}}", "data.stream=True", "train.eval_rows=16"]
    apply_overrides(config, fields)
    source, steps = open_stream(config), Path(path).stat().st_size // 2**11 * 9 // 10
    for step in range(steps):
        source.train_batch(step)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def memory(small: Path, large: Path, folder: Path) -> Iterator[Row]:
    """The largest resident size, MiB, on a file and on one ten times larger."""
    program = MEASURED.format(root=str(ROOT))
    for kind in ("prepare", "stream"):
        peaks = []
        for path in (small, large):
            command = [sys.executable, "-c", program, kind, str(path), str(folder / "measured")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(float(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "measured", ignore_errors=True)
        yield {
            "what": "memory",
            "way": kind,
            "bytes": [path.stat().st_size for path in (small, large)],
            "peak_mib": peaks,
        }


def table(rows: list[Row], consumed: float) -> str:
    lines = [f"training consumes {consumed:,.0f} tokens/s", ""]
    for row in rows:
        numbers = [
            f"{name} {value['median']:,.3g} ({value['low']:,.3g} to {value['high']:,.3g})"
            for name, value in row.items()
            if isinstance(value, dict)
        ]
        if "peak_mib" in row:
            numbers = [f"{peak:.0f} MiB" for peak in row["peak_mib"]]
        lines.append(f"{row['what']:<8} {row['way']:<18} {'  '.join(numbers)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--mib", type=int, default=32, help="size of the smaller file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    args = parser.parse_args()
    mib, rounds, steps = (2, 1, 4) if args.quick else (args.mib, args.rounds, 60)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small, large, bpe = folder / "small.jsonl", folder / "large.jsonl", folder / "bpe.json"
        write_text(small, mib)
        write_text(large, 10 * mib)
        train_bpe("", VOCAB, str(bpe))
        consumed = training(folder, steps)
        rows = preparing(small, bpe, folder, rounds)
        prepare(str(small), str(bpe), str(folder / "read"))
        rows += reading(small, folder / "read", bpe, rounds, consumed)
        rows += memory(small, large, folder)
        digest = hashlib.sha256(small.read_bytes()).hexdigest()
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    content = {"machine": machine, "sha256": digest, "training": consumed, "rows": rows}
    Path(args.out).write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows, consumed))


if __name__ == "__main__":
    main()
