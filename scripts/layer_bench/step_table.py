"""The rows of bench_step.py as a section of the page."""

from scripts.layer_bench.markdown import table

TARGETS = {
    "moe_over_dense": ">= 0.85",
    "ours_over_plain": "<= 1.05",
    "host_ms": "<= 2",
    "loader": ">= 20",
    "first_step cold": "<= 20",
    "first_step cached": "<= 8",
}
UNITS = {"host_ms": " ms", "first_step": " s"}

TEXT = """\
## The whole step

    python scripts/bench_step.py --out step.json

Pairs of steps in alternating order in one process; medians and quartiles of wall time and
processor time. `moe_over_dense` is the MoE model's tokens per second relative to those of the
dense model with equal active FLOPs (k experts of width moe.d_ff against one FFN of their total
width). `ours_over_plain` is the time of our dense step relative to that of the same model and
optimizer written as one plain jitted JAX function; both are first checked to give the same losses.
`small` is reduced to 2 layers, 4 sequences of 256 tokens and float32, because its full steps take
minutes on two cores.
"""


def of_a_step(result: dict) -> bool:
    """True for a result of bench_step.py."""
    return any("row" in row for row in result["rows"])


def render(result: dict) -> str:
    body = []
    for row in result["rows"]:
        name, unit = row["row"], UNITS.get(row["row"].split()[0], "")
        value = row["ratio" if "ratio" in row else "value"]
        cpu = row.get("cpu_ratio", row.get("cpu", row.get("cpu_mean")))
        shown = [_spread(x) + unit if x is not None else "" for x in (value, cpu)]
        body.append([f"`{name}`", row["what"], *shown, TARGETS.get(name, "")])
    head = ["what", "of", "wall", "processor", "target"]
    machine = result["machine"]
    about = (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load'][0]:.1f} at "
        f"the start; jax {machine['jax']}.\n"
    )
    return "\n".join([TEXT, about, table(head, body)])


def shortfalls(result: dict) -> list[str]:
    """Medians that miss their target."""
    found = []
    for row in result["rows"]:
        goal = TARGETS.get(row["row"], "")
        value = row["ratio" if "ratio" in row else "value"]["median"]
        side, _, bound = goal.partition(" ")
        if goal and not (value >= float(bound) if side == ">=" else value <= float(bound)):
            found.append(f"`{row['row']}`, {row['what']}: {value:.2f}, target {goal}.")
    return found


def _spread(found: dict | float) -> str:
    if not isinstance(found, dict):
        return f"{found:.2f}"
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
