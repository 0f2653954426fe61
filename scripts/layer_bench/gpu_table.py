"""Rows of scripts/bench_gpu.py as tables, and the fastest candidate."""

from scripts.layer_bench.markdown import ratio, table

KINDS = {
    "gpu-product": "Grouped product over one dense product of equal FLOPs",
    "gpu-layer": "Layer over the dense FFN of equal active FLOPs",
}

TEXT = """\
## GPU

    python scripts/bench_gpu.py --out gpu.json

In bfloat16, with 16384 tokens: *fine* D 2048, F 1408, E 64, k 6; *mixtral* D 4096, F 14336, E 8, k
2. The product is the one into the hidden layer (T k rows by their experts' [D, F]). The number in
the name of a `cells` row is the factor by which it computes more FLOPs. Outputs and gradients are
checked against float64 before timing: products within 2^-8 of the largest entry, layers within
2^-6.
"""

Row = dict


def render(rows: list[Row]) -> str:
    """Both tables and the choices."""
    parts = []
    for kind, title in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            parts += [f"{title}:\n", _table(own)]
    return "\n".join([*parts, "Fastest, forward and backward:\n", *choices(rows)]) + "\n"


def choices(rows: list[Row]) -> list[str]:
    """One line per shape and kind: the fastest candidate and its margin."""
    keys = dict.fromkeys((row["kind"], row["shape"]) for row in rows)
    lines = []
    for kind, shape in keys:
        own = [r for r in rows if (r["kind"], r["shape"]) == (kind, shape)]
        what = f"* {shape}, {'product' if kind == 'gpu-product' else 'layer'}: "
        lines.append(what + _choice([r for r in own if "drops" in r]))
    return lines


def _choice(measured: list[Row]) -> str:
    """The fastest, and where that one drops pairs beyond a capacity, the fastest that does not."""
    if not measured:
        return "no choice, nothing was measured."
    text = _first(measured)
    dropless = [r for r in measured if not r["drops"]]
    fastest = min(measured, key=lambda r: r["fwdbwd_ratio"])
    if fastest["drops"] and dropless:
        text += f" It has a capacity; of those that drop nothing: {_first(dropless)}"
    return text


def _first(rows: list[Row]) -> str:
    first, *others = sorted(rows, key=lambda r: r["fwdbwd_ratio"])
    text = f"`{first['impl']}`, {ratio(first, 'fwdbwd')}"
    if not others:
        return f"{text}, the only one measured."
    second = others[0]
    apart = first["fwdbwd_spread"][1] < second["fwdbwd_spread"][0]
    verdict = "quartiles apart" if apart else "quartiles overlap, so a tie"
    return f"{text}, before `{second['impl']}`, {ratio(second, 'fwdbwd')}: {verdict}."


def _table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        start = [row["shape"], f"`{row['impl']}`"]
        if "not_run" in row:
            body.append([*start, f"not measured: {row['not_run']}", "", "", ""])
            continue
        error = f"{row['max_error']:.0e}" if "max_error" in row else ""
        both = [ratio(row, "fwd"), ratio(row, "fwdbwd"), f"{row['fwdbwd_ms']:.3g}"]
        body.append([*start, *both, error])
    return table(["shape", "candidate", "forward", "forward+backward", "ms", "error"], body)
