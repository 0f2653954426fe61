"""Write docs/benchmarks.md from results of bench_moe_layer.py, bench_step.py and bench_gpu.py:

python scripts/make_benchmark_docs.py FILE [FILE ...]

A row of a later file replaces the same row of an earlier one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.layer_bench import gate_table, gpu_table, step_table
from scripts.layer_bench.markdown import ratio, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"

TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("dropless", "A"): {"fwd": 1.00, "fwdbwd": 1.10},
    ("dropless", "B"): {"fwd": 1.25, "fwdbwd": 1.40},
    ("dropless", "C"): {"fwd": 1.10, "fwdbwd": 1.15},
    ("cells-1.25", "A"): {"fwdbwd": 1.30},
    ("cells-1.25", "B"): {"fwdbwd": 1.65},
    ("cells-1.25", "C"): {"fwdbwd": 1.30},
    ("cells-1.0", "A"): {"fwdbwd": 1.08},
    ("cells-1.0", "B"): {"fwdbwd": 1.40},
    ("cells-1.0", "C"): {"fwdbwd": 1.08},
}
ZIPF_TARGET, EXPERTS_TARGET, TEMP_TARGET, TRAFFIC_TARGET = 1.15, 1.30, 1.20, 1.05

INTRODUCTION = """\
# Benchmarks

<!-- Written by scripts/make_benchmark_docs.py from the output of scripts/bench_moe_layer.py. -->

    python scripts/bench_moe_layer.py --out bench.json
    python scripts/make_benchmark_docs.py bench.json [step.json] [gpu.json]

Ratios compare a layer's time with that of a dense SwiGLU of equal active FLOPs (hidden size k F;
the faster of its forms on [tokens, D] and [sequences, tokens, D]). Each run of a layer is divided
by the mean of the dense runs just before and after it. The tables show the median of these ratios
with quartiles in brackets, for one device in float32, router included, with the batch in sequences
of 512 tokens. Blocks of the transformers library are divided by torch's own dense FFN. The row
`dense` divides the dense FFN by itself; its distance from 1 is the noise. Outputs and gradients of
every layer (tokens, router, experts) were checked in the same process against the dense oracle in
float64, on fewer tokens ({tokens}; 0: all). The column `error` is the largest difference, relative
to the largest entry of the array.

Shapes: A 4096 tokens, D 256, F 1024, E 8, k 2; B 8192, 256, 512, 64, 2; C 4096, 512, 1024, 16, 4.
"""

MEMORY = """\
## Memory

`temporaries` are the temporary buffers of the compiled forward and backward pass, also relative to
the dense FFN's. The target is {target} times the dense FFN's plus the exchange buffers (packed
rows in both directions, with their gradients). `kept` is the memory saved for the backward pass,
including the layer's input, per token and relative to k (D + 2 F) + D floats.
"""

WHY = """\
* The machine is shared. Ratios are paired for that reason, and the load at the start is given
  above.
* In the whole step, the optimizer updates all experts, which have E/k times the parameters of the
  dense FFN, and on CPU an update is memory-bound. How much of the gap this explains was not
  measured separately (`moejax profile` shows the parts of a step).
* `kept` exceeds k (D + 2 F) + D because it counts the layer's input twice (as given and by
  sequence), and because the experts' outputs, k D floats per token, are saved: the gradient of a
  router weight is their product with the output's gradient. `cells` also saves its empty slots.
* At a capacity factor of 1.25 `cells` computes 1.25 times the FLOPs, which leaves little time for
  anything else in shape A, where experts are large.
* Weights of the experts, and their gradients, grow with the number of experts: at E = 256 and the
  widths of that table they take 200 MB each, against 2 MB for the dense FFN. Whether this is the
  cause was not measured separately.
* The bytes of `dropless` and `dropless_once` are the send sizes of their ragged exchanges. CPUs
  have no such exchange, and every device gathers all rows instead. `dropless_once` sends 2 k
  floats of routing with each row, which are counted, and none on the way back.
* Layers missing from a table were left out of that run.
"""


def render(results: list[dict]) -> str:
    """The page for the rows of all results; machine and versions are the first one's."""
    of_gpu = [r for r in results if any(row.get("kind") in gpu_table.KINDS for row in r["rows"])]
    of_steps = [r for r in results if step_table.of_a_step(r)]
    results = [r for r in results if r not in of_gpu + of_steps]
    named = {(row["kind"], row["shape"], row["impl"], row.get("k")): row
             for result in results for row in result["rows"]}  # fmt: skip
    rows = list(named.values())
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in
             ("layer", "gates", "experts", "tokens", "traffic")}  # fmt: skip
    introduction = INTRODUCTION.format(tokens=results[0]["settings"]["check_tokens"])
    parts = [introduction, *map(setting, results)]
    if kinds["layer"]:
        parts += [layer_tables(kinds["layer"]), memory_table(kinds["layer"])]
    if kinds["gates"]:
        parts.append(gate_table.render(kinds["gates"]))
    for kind, section in (
        ("experts", experts_table), ("tokens", tokens_table), ("traffic", traffic_table),
    ):  # fmt: skip
        if kinds[kind]:
            parts.append(section(kinds[kind]))
    parts += [step_table.render(result) for result in of_steps]
    parts.append(gpu_section(of_gpu))
    missed = shortfalls(kinds) + [m for result in of_steps for m in step_table.shortfalls(result)]
    parts.append("## Missed targets, and notes\n\n" + "".join(f"* {m}\n" for m in missed) + WHY)
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def setting(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_at_start']:.1f} "
        f"at the start. Versions: {named}. {result['settings']['date']}, "
        f"{result['settings']['rounds']} rounds.\n"
    )


def layer_tables(rows: list[dict]) -> str:
    parts = []
    for shape in dict.fromkeys(r["shape"] for r in rows):
        body = []
        for row in (r for r in rows if r["shape"] == shape):
            if "not_run" in row:
                body.append([f"`{row['impl']}`", "not run", row["not_run"], "", "", ""])
                continue
            goal = TARGETS.get((row["impl"], shape), {})
            wanted = [f"{goal[f]:.2f}" if f in goal else "" for f in ("fwd", "fwdbwd")]
            error = f"{row['max_error']:.0e}" if row.get("max_error") is not None else ""
            body.append([
                f"`{row['impl']}`", ratio(row, "fwd"), wanted[0], ratio(row, "fwdbwd"), wanted[1],
                error,
            ])  # fmt: skip
        head = ["layer", "forward", "target", "forward+backward", "target", "error"]
        parts.append(f"## Shape {shape}\n\n" + table(head, body))
    return "\n".join(parts)


def memory_table(rows: list[dict]) -> str:
    body = []
    for row in rows:
        if "temp_bytes" not in row:
            continue
        kept = row.get("saved_bytes_per_token")
        body.append([
            row["shape"], f"`{row['impl']}`", f"{row['temp_bytes'] / 2**20:.0f}",
            f"{row['temp_over_dense']:.2f}",
            f"{temp_limit(row, rows) / 2**20:.0f}" if "exchange_bytes" in row else "",
            f"{kept / 4:.0f}" if kept else "", f"{kept / row['saved_floor']:.2f}" if kept else "",
        ])  # fmt: skip
    head = ["shape", "layer", "temporaries, MiB", "over dense", "at most, MiB",
            "kept, floats per token", "over k (D + 2 F) + D"]  # fmt: skip
    return MEMORY.format(target=TEMP_TARGET) + "\n" + table(head, body)


def temp_limit(row: dict, rows: list[dict]) -> float:
    """Temporaries a layer may have: 1.2 times the dense FFN's plus its exchange buffers."""
    (dense,) = (
        r["temp_bytes"] for r in rows if r["shape"] == row["shape"] and r["impl"] == "dense"
    )
    return TEMP_TARGET * dense + row["exchange_bytes"]


def gpu_section(results: list[dict]) -> str:
    if not results:
        return f"{gpu_table.TEXT}\nNot measured: this page was made without a result from a GPU.\n"
    parts = [
        f"Device: {r['machine']['device']}. {setting(r)}\n{gpu_table.render(r['rows'])}"
        for r in results
    ]
    return "\n".join([gpu_table.TEXT, *parts])


def experts_table(rows: list[dict]) -> str:
    body = [[f"`{r['impl']}`", r["shape"], ratio(r, "fwdbwd"), f"{r['over_least_E']:.2f}"]
            for r in rows]  # fmt: skip
    head = ["layer", "shape", "forward+backward over dense", "over the least E"]
    return "## Number of experts at fixed active FLOPs\n\n" + table(head, body)


def tokens_table(rows: list[dict]) -> str:
    body = [[f"`{r['impl']}`", r["shape"], f"{r['us_per_token']:.1f}", ratio(r, "per_token")]
            for r in rows]  # fmt: skip
    head = ["layer", "shape", "us per token", "over the middle row's"]
    return "## Number of tokens, forward+backward\n\n" + table(head, body)


def traffic_table(rows: list[dict]) -> str:
    body = [
        [
            r["shape"], f"`{r['impl']}`", f"{r['bytes_one_way'] / 2**20:.1f}",
            f"{r['bytes_over_minimum']:.3f}", f"{100 * r['dropped']:.1f} %",
        ]
        for r in rows
    ]  # fmt: skip
    head = ["shape", "transport", "MiB to experts", "over k copies per remote token", "dropped"]
    text = f"## Exchange on {rows[0]['devices']} devices\n\n"
    return text + "Bytes sent to other devices, summed over all devices.\n\n" + table(head, body)


def shortfalls(kinds: dict[str, list[dict]]) -> list[str]:
    """Every stated target that a median misses."""
    layer = [r for r in kinds["layer"] if "not_run" not in r]
    found = []
    for row in layer:
        for field, goal in TARGETS.get((row["impl"], row["shape"]), {}).items():
            if row[f"{field}_ratio"] > goal:
                what = {"fwd": "forward", "fwdbwd": "forward+backward"}[field]
                found.append(f"`{row['impl']}`, {row['shape']}, {what}: {ratio(row, field)}, "
                             f"target {goal:.2f}.")  # fmt: skip
        if "exchange_bytes" in row and row["impl"].startswith(("dropless", "cells")):
            limit = temp_limit(row, layer)
            if row["temp_bytes"] > limit:
                found.append(f"`{row['impl']}`, {row['shape']}: temporaries of "
                             f"{row['temp_bytes'] / 2**20:.0f} MiB, target "
                             f"{limit / 2**20:.0f}.")  # fmt: skip
    by_name = {(r["shape"], r["impl"]): r for r in layer}
    for (shape, impl), row in by_name.items():
        even = by_name.get((shape, "dropless"))
        if impl == "dropless-zipf" and even:
            skew = row["fwdbwd_ratio"] / even["fwdbwd_ratio"]
            if skew > ZIPF_TARGET:
                found.append(f"{shape}: skewed routing takes {skew:.2f} times as long as even "
                             f"routing, target {ZIPF_TARGET}.")  # fmt: skip
    for impl in dict.fromkeys(r["impl"] for r in kinds["experts"]):
        times = [r["fwdbwd_ratio"] for r in kinds["experts"] if r["impl"] == impl]
        change = max(times) / min(times)
        if change > EXPERTS_TARGET:
            found.append(f"`{impl}`: time changes {change:.2f}x with the number of experts, "
                         f"target {EXPERTS_TARGET}.")  # fmt: skip
    found += gate_table.shortfalls(kinds["gates"])
    for row in kinds["traffic"]:
        if row["impl"] in ("cells-1.0", "dropless") and row["bytes_over_minimum"] > TRAFFIC_TARGET:
            found.append(f"`{row['impl']}`, {row['shape']}: sends {row['bytes_over_minimum']:.2f} "
                         f"times the minimum, target {TRAFFIC_TARGET}.")  # fmt: skip
    return found


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:]]
    if not files:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not any("limit_gb" in result["settings"] for result in results):
        print("none of the files is a result of bench_moe_layer.py; name one", file=sys.stderr)
        sys.exit(2)
    page = render(results)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)
