"""Memory and speed of `moejax convert`, on a model of several shards.

    python scripts/measure_convert.py --gigabytes=3.4 --folder=/tmp/measure

Makes a Mixtral in bfloat16 whose files are sparse: holes, but for the beginning of each tensor.
Then brings it in and writes it out, each in a process of its own, and samples the memory that is
the process's own (RssAnon of /proc/PID/status; pages of mapped files can be dropped) from after its
imports on. Linux only. Needs about 4 times the model's size on the disk, and deletes it.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCAB, HEADS, EXPERTS = 32000, 16, 8
BYTES = 2
"""The size of a bfloat16."""
INTERVAL = 0.01
"""Seconds between two samples."""

CHILD = """
import sys
import jax, orbax.checkpoint, tensorstore
from moejax import cli
from moejax.hf import exported, imported
for command in sys.stdin:
    print(cli.main(command.split("\\x00")[:-1]), flush=True)
"""
"""Runs commands of moejax, each a line of words that end with NUL."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a Mixtral."""

    width: int
    hidden: int
    layers: int
    vocab: int = VOCAB

    @classmethod
    def of(cls, gigabytes: float) -> "Size":
        """8 layers of about this size together, in bfloat16."""
        vocab = VOCAB if gigabytes > 1 else 1024
        width = 2048 if gigabytes > 1 else 512
        per_layer = (gigabytes * 1e9 / BYTES - 2 * vocab * width) / 8
        hidden = (per_layer - 3 * width**2) / (EXPERTS * 3 * width)
        return cls(width, max(64, round(hidden) // 64 * 64), 8, vocab)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> Iterator[tuple[str, list[int]]]:
        d, f = self.width, self.hidden
        yield "model.embed_tokens.weight", [self.vocab, d]
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{at}.{name}.weight", [d]
            for name, rows in (("q", d), ("k", d // 2), ("v", d // 2), ("o", d)):
                yield f"{at}.self_attn.{name}_proj.weight", [rows, d]
            yield f"{at}.block_sparse_moe.gate.weight", [EXPERTS, d]
            for expert in range(EXPERTS):
                for name, shape in (("w1", [f, d]), ("w2", [d, f]), ("w3", [f, d])):
                    yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", shape
        yield "model.norm.weight", [d]
        yield "lm_head.weight", [self.vocab, d]


def write_model(folder: Path, size: Size, shards: int) -> list[int]:
    """Writes the model; returns the sizes of its shards in bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(size.config()))
    named = [(name, shape, _count(shape) * BYTES) for name, shape in size.shapes()]
    most = sum(n for *_, n in named) / shards
    files: list[list[tuple[str, list[int], int]]] = [[]]
    for tensor in named:
        if sum(n for *_, n in files[-1]) + tensor[2] / 2 > most and len(files) < shards:
            files.append([])
        files[-1].append(tensor)
    weights = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_sparse(folder / name, tensors)
        weights |= {tensor: name for tensor, *_ in tensors}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [(folder / name).stat().st_size for name in sorted(set(weights.values()))]


def _write_sparse(path: Path, tensors: list[tuple[str, list[int], int]]) -> None:
    header, end, begins = {}, 0, []
    for name, shape, count in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + count]}
        begins.append(end)
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in begins:  # tensorstore keeps no chunk that holds nothing but zeros
            file.seek(8 + len(text) + begin)
            file.write(b"\x80\x3f" * 64)
        file.truncate(8 + len(text) + end)


def _count(shape: list[int]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


class Child:
    """A process that runs commands of moejax, and its memory in bytes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def memory(self, name: str = "RssAnon") -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(text.partition(f"{name}:")[2].split()[0]) * 1024

    def run(self, *words: str) -> dict[str, float]:
        """Runs a command; its peak of memory above that before, and its seconds.

        Raises:
          RuntimeError: it failed.
        """
        before, peak, start = self.settled(), 0, time.monotonic()
        assert self.process.stdin is not None and self.process.stdout is not None

        answer: list[str] = []
        output = self.process.stdout
        reader = threading.Thread(target=lambda: answer.extend(_answer(output)))
        self.process.stdin.write("".join(f"{word}\0" for word in words) + "\n")
        self.process.stdin.flush()
        reader.start()
        while reader.is_alive():
            try:
                peak = max(peak, self.memory())
            except (OSError, IndexError):  # it has ended
                break
            reader.join(INTERVAL)
        reader.join()
        if answer[-1:] != ["0"]:
            raise RuntimeError(f"`moejax {' '.join(words)}` failed")
        seconds = time.monotonic() - start
        return {"before": before, "peak": peak - before, "seconds": seconds}

    def settled(self) -> int:
        """The memory once imports are done."""
        last = -1
        while True:
            time.sleep(0.5)
            found = self.memory()
            if found == last and found > 1 << 24:
                return found
            last = found

    def end(self) -> int:
        """Ends the process; its highest resident memory, pages of files included."""
        highest = self.memory("VmHWM")
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        return highest


def _answer(output: Any) -> Iterator[str]:
    """The lines of a command up to its exit status."""
    for line in output:
        yield line.strip()
        if line.strip().isdecimal():
            return


def measure(folder: Path, size: Size, shards: int, warm: bool = False) -> dict[str, Any]:
    """Both ways of a model of these sizes, with files below ``folder``, which are deleted.

    Args:
      warm: convert a tiny model first, with a small text, so that what any conversion needs is not
        counted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        files = write_model(folder / "hf", size, shards)
        largest = max(files)
        result: dict[str, Any] = {
            "model_bytes": sum(files),
            "shards": len(files),
            "largest_shard": largest,
            "largest_tensor": max(_count(shape) * BYTES for _, shape in size.shapes()),
        }
        flags = []
        if warm:
            write_model(folder / "tiny", Size(32, 64, 1, 512), 1)
            (folder / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(400)))
            flags = [f"--config.data.path={folder / 'text.txt'}"]
            flags += ["--config.train.seq_len=16", "--config.train.eval_rows=8"]
        ways = {
            "from_hf": ("--from-hf", "--workdir", "hf", "run"),
            "to_hf": ("--to-hf", "--out", "run", "out"),
        }
        for way, (source, target, come, go) in ways.items():
            child = Child()
            try:
                if warm:
                    tiny = {"hf": "tiny", "run": "tiny-run", "out": "tiny-out"}
                    child.run(
                        "convert",
                        f"{source}={folder / tiny[come]}",
                        f"{target}={folder / tiny[go]}",
                        *(flags if way == "from_hf" else ()),
                    )
                found = child.run(
                    "convert",
                    f"{source}={folder / come}",
                    f"{target}={folder / go}",
                    *(flags if way == "from_hf" else ()),
                )
            finally:
                found_highest = child.end()
            found["highest_resident"] = found_highest
            result[way] = {**found, "ratio": found["peak"] / largest}
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(result: dict[str, Any]) -> str:
    mega = 1e6
    lines = [
        f"{result['shards']} shards of at most {result['largest_shard'] / mega:,.0f} MB, tensors "
        f"of at most {result['largest_tensor'] / mega:,.0f} MB, "
        f"{result['model_bytes'] / mega:,.0f} MB in all",
        "",
        "| direction | peak (MB) | peak / largest shard | seconds | MB/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, name in (("from_hf", "--from-hf"), ("to_hf", "--to-hf")):
        found = result[way]
        speed = result["model_bytes"] / mega / found["seconds"]
        lines.append(
            f"| `{name}` | {found['peak'] / mega:,.0f} | {found['ratio']:.2f} | "
            f"{found['seconds']:.0f} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of moejax convert.")
    parser.add_argument("--gigabytes", type=float, default=3.4, help="size of the model")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, then deleted")
    parser.add_argument("--warm", action="store_true", help="leave out what any conversion needs")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"--folder={args.folder} exists; name a new folder")
    result = measure(args.folder, Size.of(args.gigabytes), args.shards, args.warm)
    print(json.dumps(result))
    print(table(result))


if __name__ == "__main__":
    main()
