"""Benchmark of grouped products on a GPU: python scripts/bench_gpu.py --out FILE [--tiny]

In bfloat16, on one GPU: grouped products (tokamax's Triton and Mosaic kernels, `lax.ragged_dot`,
batched products over cells) over one dense product of equal FLOPs, and `moejax.MoE` over the dense
FFN of equal active FLOPs; forward, and forward and backward. Runs are by turns as in
`scripts/bench_moe_layer.py`. Before anything is timed its output and gradients are compared with
float64: products at full size, layers on fewer tokens. Without a CUDA GPU the rows are written as
not measured; `--tiny` runs tiny shapes on whatever device there is, which shows that the script
works and nothing about speed. Ends with 1 if a candidate was wrong.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_moe_layer import chosen, machine, settings, versions


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which grouped product a GPU should run.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", default="", help="default: all")
    parser.add_argument("--rounds", type=int, default=21, help="timed runs of each, by turns")
    parser.add_argument(
        "--check-tokens", type=int, default=1024, help="tokens of the layers' check; 0: all"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on any device: a trial")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from scripts.layer_bench import gpu_table
    from scripts.layer_bench.problems import GPU_SHAPES, SHAPES

    shapes = {"tiny": SHAPES["tiny"]} if args.tiny else GPU_SHAPES
    names = chosen("--shapes", args.shapes, tuple(shapes))
    if not args.out.parent.is_dir():
        print(f"--out: {args.out.parent} is not a folder; make it first", file=sys.stderr)
        sys.exit(2)
    result = {
        "machine": {**machine(), "device": device()},
        "versions": versions(),
        "settings": {**settings(args), "dtype": "bfloat16"},
        "rows": [],
    }
    # Written after every row, so that a run that is cut off leaves what it has measured.
    for row in measure(args, [shapes[name] for name in names]):
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(gpu_table.render(result["rows"]))
    if any("wrong" in row for row in result["rows"]):
        sys.exit(1)


def device() -> str:
    import jax

    return jax.devices()[0].device_kind


def no_gpu() -> str | None:
    """The reason that nothing can be measured on this machine, or None."""
    import jax

    if jax.default_backend() == "gpu" and "NVIDIA" in device():
        return None
    return f"no CUDA GPU here, JAX runs on {jax.default_backend()}"


def measure(args: argparse.Namespace, shapes: list) -> Iterator[dict]:
    from scripts.layer_bench import gpu_layers, gpu_products

    why = None if args.tiny else no_gpu()
    for shape in shapes:
        if why is not None:
            for name in gpu_products.CANDIDATES:
                yield gpu_products.not_measured(shape, gpu_products.KIND, name, why)
            for name in gpu_layers.NAMES:
                yield gpu_products.not_measured(shape, gpu_layers.KIND, name, why)
            continue
        yield from gpu_products.rows(shape, args.rounds)
        yield from gpu_layers.rows(shape, args.rounds, args.check_tokens)


if __name__ == "__main__":
    main()
