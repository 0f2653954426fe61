"""Benchmark of the MoE layer: python scripts/bench_moe_layer.py --out FILE

Times are ratios to the fastest dense FFN of equal active FLOPs, run in turns in the same process.
Outputs and gradients of everything timed are first checked against the oracle in float64. One
device, float32, router included. `scripts/make_benchmark_docs.py` writes the result as a page.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = ("layer", "gates", "experts", "tokens", "traffic")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What an MoE layer costs, over a dense FFN.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", default="A,B,C", help="default A,B,C; also: tiny")
    parser.add_argument("--impls", default="", help="of the main table; default: all")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"default {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each, by turns")
    parser.add_argument("--limit-gb", type=float, default=8.0, help="skip what needs more memory")
    parser.add_argument(
        "--check-tokens", type=int, default=1024, help="tokens of the float64 check; 0: all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: a trial")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shapes, args.rounds = "tiny", 2
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from scripts.layer_bench import shapes_run
    from scripts.layer_bench.problems import SHAPES

    shapes = chosen("--shapes", args.shapes, tuple(SHAPES))
    impls = chosen("--impls", args.impls, shapes_run.all_names())
    parts = chosen("--parts", args.parts, PARTS)
    result = {"machine": machine(), "versions": versions(), "settings": settings(args), "rows": []}
    # Written after every row, so that a run that is cut off leaves what it has measured.
    for row in measure(args, shapes, impls, parts):
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(line(row), flush=True)


def chosen(flag: str, text: str, valid: tuple[str, ...]) -> list[str]:
    """The names in a comma-separated list, all of them where it is empty."""
    names = [name for name in text.split(",") if name] or list(valid)
    for name in names:
        if name not in valid:
            print(f"{flag}: {name!r} is unknown; use some of {', '.join(valid)}", file=sys.stderr)
            sys.exit(2)
    return names


def measure(
    args: argparse.Namespace, shapes: list[str], impls: list[str], parts: list[str]
) -> Iterator[dict]:
    from scripts.layer_bench import gate_share, scaling, shapes_run, traffic
    from scripts.layer_bench.problems import SHAPES

    limits = {"rounds": args.rounds, "limit_gb": args.limit_gb, "check_tokens": args.check_tokens}
    if "traffic" in parts:
        yield from traffic.measure(shapes)
    if "layer" in parts:
        for name in shapes:
            yield from shapes_run.rows(SHAPES[name], impls, **limits)
    if "gates" in parts:
        for name in shapes:
            yield from gate_share.rows(SHAPES[name], args.rounds)
    scaled = [name for name in ("dropless", "cells-1.0") if name in impls]
    if "experts" in parts:
        yield from scaling.over_experts(scaled, args.rounds, args.quick)
    if "tokens" in parts:
        yield from scaling.over_tokens(scaled, args.rounds, args.quick)


def machine() -> dict:
    """The kind of machine, without its name."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), "load_at_start": load}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in ("moejax", "jax", "jaxlib", "flax", "tokamax", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings(args: argparse.Namespace) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    fields = ("rounds", "check_tokens", "limit_gb")
    return {
        "date": now.strftime("%Y-%m-%d"),
        **{name: getattr(args, name) for name in fields if hasattr(args, name)},
    }


def line(row: dict) -> str:
    """A row for people."""
    head = f"{row['kind']:8s} {row['shape']:34s} {row['impl']:20s}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    parts = []
    for field, label in (
        ("fwd", "fwd"), ("fwdbwd", "fwd+bwd"), ("per_token", "per token"),
    ):  # fmt: skip
        if f"{field}_ratio" in row:
            low, high = row[f"{field}_spread"]
            parts.append(f"{label} {row[f'{field}_ratio']:.2f} [{low:.2f}, {high:.2f}]")
    if "target" in row:
        parts.append(f"target {row['target']:.2f} {'met' if row['met'] else 'missed'}")
    if "bytes_over_minimum" in row:
        parts.append(f"bytes over minimum {row['bytes_over_minimum']:.3f}")
    return f"{head} {'  '.join(parts)}"


if __name__ == "__main__":
    main()
