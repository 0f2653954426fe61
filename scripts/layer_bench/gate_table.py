"""The rows of gate_share.py as a section of the page, and their target."""

from scripts.layer_bench.markdown import ratio, table

TARGET, BALANCED_TARGET, BALANCED = 0.15, 0.25, ("base", "sbase")

TEXT = f"""\
## Gates

The time of a gate relative to that of its layer's experts, paired as above. The gate's time is
that of its call in training, on groups of one sequence, with fresh parameters and all its outputs;
backward, of the gradients of its parameters and of the tokens, given gradients of its weights. The
experts' time is that of the SwiGLU that `dropless` calls, on as many packed rows as this gate has
active pairs, with the gate's loads. Neither includes packing, losses and statistics. Gates with a
k use that of the shape; `switch` and `sbase` are also timed with their own k of 1. `dense` and a
fresh `dselect_k` visit all experts: since their loads are equal, 2 k experts are timed on all
tokens and the time is multiplied by E / (2 k). `(decided)` multiplies the parameters of the codes
by 10^4, which decides their bits as training does. The target for forward+backward is at most
{TARGET:.2f}, and {BALANCED_TARGET:.2f} for `base` and `sbase`.
"""


def target(gate: str) -> float:
    return BALANCED_TARGET if gate in BALANCED else TARGET


def render(rows: list[dict]) -> str:
    body = []
    for row in (r for r in rows if "not_run" not in r):
        body.append([
            row["shape"], f"`{row['gate']}`{row['impl'].removeprefix(row['gate'])}",
            "" if row["k"] is None else str(row["k"]), f"{row['pairs_per_token']:.2f}",
            f"{row['fwdbwd_ms']:.1f}", f"{row['experts_fwdbwd_ms']:.0f}", ratio(row, "fwd"),
            ratio(row, "fwdbwd"), f"{row['target']:.2f} {'met' if row['met'] else 'missed'}",
        ])  # fmt: skip
    head = ["shape", "gate", "k", "pairs per token", "gate, ms", "experts, ms",
            "forward", "forward+backward", "target"]  # fmt: skip
    left_out = [
        f"Not run: `{row['gate']}` at {row['shape']}, {row['not_run']}."
        for row in rows
        if "not_run" in row
    ]
    parts = [TEXT, table(head, body)]
    return "\n".join([*parts, *(["", "\n".join(left_out)] if left_out else [])])


def shortfalls(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        if not row.get("met", True):
            k = "" if row["k"] is None else f", k = {row['k']}"
            found.append(
                f"Gate `{row['impl']}`, {row['shape']}{k}: {ratio(row, 'fwdbwd')} of its experts' "
                f"time, target {row['target']:.2f}."
            )
    return found
