"""Configs and gates as text for a terminal."""

import dataclasses
import inspect
import re
import textwrap
from typing import Any

import jax
import numpy as np

from moejax import gating
from moejax.cli.equations import readable
from moejax.config import Loaded, default, flatten, moe_config, set_gate, table_of
from moejax.config.field import Field
from moejax.config.table import SECTIONS
from moejax.types import Context, Gate, GateSpec, GateTraits, Visibility

PARAGRAPH = "\n\n"
LEGEND = "* set on the command line    ~ set by the config page    (others: defaults)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One field of a resolved config; ``mark`` shows its source, as in `LEGEND`."""

    name: str
    value: Any
    field: Field
    mark: str
    before: Any


def config_tree(loaded: Loaded) -> str:
    """Every field with value, type and meaning, under its section."""
    rows = _rows(loaded)
    leaf = max(len(row.name.rpartition(".")[2]) for row in rows)
    value = min(24, max(len(repr(row.value)) for row in rows))
    lines, section = [LEGEND], ""
    for row in rows:
        here, _, name = row.name.rpartition(".")
        if here != section:
            section = here
            lines += ["", f"{section}: {SECTIONS[section]}"]
        kind, text = row.field.type.__name__, row.field.comment
        if row.field.choices:
            text = f"{text} ({row.field.range})"
        lines.append(f"{row.mark} {name:<{leaf}}  {row.value!r:<{value}}  {kind:<5}  {text}")
    return "\n".join(lines)


def config_diff(loaded: Loaded) -> str:
    """Only the fields that are not at their defaults, with their previous values."""
    rows = [row for row in _rows(loaded) if row.mark != " "]
    if not rows:
        return "every field is at its default"
    name = max(len(row.name) for row in rows)
    value = max(len(repr(row.value)) for row in rows)
    before = {"*": "page", "~": "default"}
    return "\n".join(
        [
            LEGEND,
            *(
                f"{row.mark} {row.name:<{name}}  {row.value!r:<{value}}  "
                f"({before[row.mark]}: {row.before!r})"
                for row in rows
            ),
        ]
    )


def _rows(loaded: Loaded) -> list[Row]:
    now, page = flatten(loaded.config), flatten(loaded.file_config)
    rows = []
    for name, field in table_of(loaded.config).items():
        # A gate chosen on the command line has fields the page never had: compare with defaults.
        initial = default().moe.gate.name if name == "moe.gate.name" else field.default
        before = page.get(name, initial)
        if now[name] != before:
            rows.append(Row(name, now[name], field, "*", before))
        else:
            mark = "~" if before != initial else " "
            rows.append(Row(name, now[name], field, mark, initial))
    return rows


REFERENCE = GateSpec(
    d_model=1024, num_experts=64, vocab_size=256, token_counts=lambda: np.ones(256, np.int64)
)
REFERENCE_TOKENS = 256


IN_SHORT = {
    "base": "Experts get equally many tokens, at the highest total affinity",
    "dense": "All experts, weighted by a softmax: E times the compute",
    "evomoe": "Experts whose Gumbel-softmax share is above a threshold",
    "expert_choice": "Each expert takes the C tokens of a group that score highest",
    "expert_choice_causal": "expert_choice, evaluated by a threshold instead of top-C",
    "deepseek_v2": "DeepSeek-V2's: top-6 of 160 experts, on 3 of 8 devices",
    "deepseek_v3": "DeepSeek-V3's: loss_free, top-8 of 256 experts, on 4 of 8 nodes",
    "dselect_k": "k selectors, each a product of smoothed bits, then a softmax",
    "gating_dropout": "Top-k, in a share of steps over the token's own shard alone",
    "gshard": "Two experts; the second at random, in proportion to its weight",
    "hash": "A table, drawn once, gives the experts of each token id",
    "hierarchical": "Top-k of groups of experts, then top-k within each of them",
    "loss_free": "Top-k with a bias that grows while an expert has too few tokens",
    "lory": "A merged expert for every segment, from the segment before it",
    "prototypes": "Experts in k prototypes; a token visits the best one of each",
    "quantile": "Top-k of logits minus prices that balance the load",
    "random": "k experts drawn anew for every token, step and layer",
    "remoe": "Every expert with a positive router output, its weight",
    "replay": "The experts that were recorded for a token's row and position",
    "rl": "One expert, drawn from the softmax; a reward trains the router",
    "sbase": "Top-k of an entropic transport plan with equal columns",
    "sentence": "Experts chosen by an average over the token's sequence",
    "shazeer": "Top-k of logits perturbed by learned Gaussian noise",
    "smear": "One expert per sequence, merged from the experts' weights",
    "soft": "Slots that are mixtures of all tokens, and back again",
    "sparsemixer": "k experts, each drawn among those close to the best",
    "stablemoe": "A router distilled into a table of token ids, then frozen",
    "task": "Experts chosen by the task of the token's sequence",
    "thor": "One expert per step and layer, drawn at random, for all tokens",
    "top_k": "The k experts with the largest router logits",
    "xmoe": "Top-k of cosines between projected tokens and centroids",
}
"""Short descriptions of gates whose first sentence is too long for the list."""

WIDTH = 100
"""Columns of a terminal that the list of gates fits into."""


def gates_table() -> str:
    """A line for each gate: its name, what its tokens may see, and what it does."""
    rows = [("name", "sees", "what it does")]
    rows += [(name, visibility(name), "") for name in gating.names()]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    room = WIDTH - first - second - 4
    lines = [
        f"{name:<{first}}  {visible:<{second}}  {text or description(name, room)}"
        for name, visible, text in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "sees: what a token's output may depend on besides itself and earlier tokens of its",
            "sequence: causal = nothing; future = later tokens; others = other sequences; A/B = A",
            "in training, B in evaluation (capacity factor 1.25 in training, dropless evaluation).",
            "`moejax gates NAME` has equation, fields, cost and paper.",
        ]
    )


def visibility(name: str) -> str:
    """The visibility of tokens in training and in evaluation; a single word if both are equal."""
    config = default()
    set_gate(config, name)
    return "/".join(dict.fromkeys(phases(gating.make(name).visibility(moe_config(config)))))


def description(name: str, room: int) -> str:
    """A description in at most ``room`` characters; for a preset, its gate and model."""
    text = inspect.getdoc(type(gating.make(name))) or ""
    text = " ".join(text.partition("\n\n")[0].split())
    preset = gating.PRESETS.get(name)
    if preset and preset.source:
        model = re.search(r"\(([^;)]*)", preset.source)
        text = f"{preset.gate}, preset as in {model[1] if model else preset.source}"
    elif preset:
        fields = ", ".join(f"{key}={value}" for key, value in preset.fields.items())
        text = f"{preset.gate} with {fields}"
    text = IN_SHORT.get(name, text.replace("``", "").rstrip("."))
    return textwrap.shorten(text, room, placeholder=" ...")


COLUMNS = ("in training", "in evaluation", "experts", "router", "paper (arXiv)")

MIXED = {"slots": "all, by slots", "weights": "all, merged"}
"""Experts of a gate that mixes: no token is sent to one."""

COST = (
    "experts = visited per token (by slots: each gets mixtures of the tokens; merged: one mixture\n"
    "of the experts is visited); router = FLOPs of its matrix products per token in training,\n"
    f"with d_model={REFERENCE.d_model}, {REFERENCE.num_experts} experts and sequences of "
    f"{REFERENCE_TOKENS} tokens."
)


def gate_row(name: str) -> tuple[str, ...]:
    """The ``COLUMNS`` of a gate in words."""
    config = default()
    set_gate(config, name)
    gate = gating.make(name)
    return (
        *phases(gate.visibility(moe_config(config))),
        visited(gate),
        router_cost(gate),
        ", ".join(papers(name)),
    )


def visited(gate: Gate) -> str:
    """The number of experts that a token visits, in words."""
    mixes = GateTraits.of(gate).mixes
    if mixes:
        return MIXED[mixes]
    few, more = gate.columns(8), gate.columns(16)
    return str(few) if few == more else "up to all"


def router_cost(gate: Gate) -> str:
    """``router_flops`` in thousands; "-" where the gate refuses the sizes or cannot be counted."""
    try:
        gate.check(REFERENCE.num_experts, train=True)
        flops = router_flops(gate)
    except ValueError:
        return "-"
    return f"{flops / 1000:.1f}k" if flops else "0"


def router_flops(gate: Gate) -> float:
    """Matrix-product FLOPs per token of routing in training, at the reference sizes."""
    from moejax.train.cost.flops import count_flops

    def shapes(fn: Any, *args: Any) -> Any:
        return jax.eval_shape(lambda: fn(*args))

    params = shapes(gate.init, jax.random.key(0), REFERENCE)
    state = shapes(gate.init_state, REFERENCE)
    context = Context.of(1, REFERENCE_TOKENS, key=jax.random.key(0)).grouped(1, train=True)
    x_GTD = jax.ShapeDtypeStruct((1, REFERENCE_TOKENS, REFERENCE.d_model), np.float32)

    def route(params: Any, state: Any, x_GTD: jax.Array) -> Any:
        return gate(params, state, x_GTD, context).routing

    jaxpr = jax.make_jaxpr(route)(params, state, x_GTD)
    return count_flops(jaxpr) / REFERENCE_TOKENS


def papers(name: str) -> list[str]:
    """The arXiv numbers in a preset's source, otherwise in its gate's description, in order."""
    text = gating.source(name) or inspect.getdoc(type(gating.make(name))) or ""
    return list(dict.fromkeys(re.findall(r"arXiv\s+(\d{4}\.\d{4,5})", text)))


def phases(visibility: Visibility) -> tuple[str, str]:
    """The visibility of a gate in training and in evaluation, in words."""

    def label(future: bool, others: bool) -> str:
        parts = [word for word, visible in (("future", future), ("others", others)) if visible]
        return "+".join(parts) or "causal"

    return (
        label(visibility.train_future, visibility.train_others),
        label(visibility.eval_future, visibility.eval_others),
    )


def gate_page(name: str) -> str:
    """One gate: equation, paper and cost, its fields, and the other fields that its preset sets."""
    fields, preset = gating.fields(name), gating.preset_overrides(name)
    width = max((len(field) for field in fields), default=0)
    facts = [f"{column}: {cell}" for column, cell in zip(COLUMNS, gate_row(name), strict=True)]
    first, _, rest = readable(inspect.getdoc(type(gating.make(name))) or "").partition(PARAGRAPH)
    lines = textwrap.wrap(f"{name}: {first}", WIDTH) + (["", *rest.split("\n")] if rest else [])
    if gating.source(name):
        lines += ["", *textwrap.wrap(f"preset: {gating.source(name)}", WIDTH)]
    lines += ["", "; ".join(facts[:-1]), COST, "", "config.moe.gate:"]
    for field, (value, comment) in fields.items():
        head = f"  {field:<{width}}  {value!r:<10}  "
        lines += textwrap.wrap(head + comment, WIDTH, subsequent_indent=" " * len(head)) or [head]
    if preset:
        lines += ["", "also sets:", *(f"  moe.{key} = {value!r}" for key, value in preset.items())]
    return "\n".join(lines)
