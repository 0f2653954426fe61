"""Configs and gates as text for a terminal."""

import dataclasses
import inspect
from typing import Any

from moejax import gating
from moejax.config import Loaded, default, flatten, moe_config, set_gate, table_of
from moejax.schema import SECTIONS, Field
from moejax.types import Visibility

LEGEND = "* set on the command line    ~ set by the config page    (others: defaults)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One field of a resolved config; ``mark`` says who set it."""

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
    """Only the fields that are not at their defaults, with what they were before."""
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


def gates_table() -> str:
    """Every gate name: what its tokens may see with default capacities, and its fields."""
    rows = [("name", "in training", "in evaluation", "fields and defaults")]
    for name in gating.names():
        config = default()
        set_gate(config, name)
        seen = gating.make(name).visibility(moe_config(config))
        rows.append((name, *phases(seen), _fields(name)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join(
        [
            *table,
            "",
            "A token's output may depend on: causal = itself and earlier tokens of its sequence;",
            "future = later tokens too; others = other sequences too. Capacity factor 1.25 in",
            "training, dropless evaluation. `moejax gates NAME` explains one gate.",
        ]
    )


def phases(seen: Visibility) -> tuple[str, str]:
    """What a token sees in training and in evaluation, in words."""

    def label(future: bool, others: bool) -> str:
        parts = [word for word, is_seen in (("future", future), ("others", others)) if is_seen]
        return "+".join(parts) or "causal"

    return (
        label(seen.train_future, seen.train_others),
        label(seen.eval_future, seen.eval_others),
    )


def _fields(name: str) -> str:
    return " ".join(f"{field}={value}" for field, (value, _) in gating.fields(name).items())


def gate_page(name: str) -> str:
    """One gate: its equation and paper, its fields, and what else its preset sets."""
    fields, preset = gating.fields(name), gating.preset_overrides(name)
    width = max((len(field) for field in fields), default=0)
    lines = [f"{name}: {inspect.getdoc(type(gating.make(name)))}"]
    if gating.source(name):
        lines += ["", f"preset: {gating.source(name)}"]
    lines += ["", "config.moe.gate:"]
    lines += [
        f"  {field:<{width}}  {value!r:<10}  {comment}"
        for field, (value, comment) in fields.items()
    ]
    if preset:
        lines += ["", "also sets:", *(f"  moe.{key} = {value!r}" for key, value in preset.items())]
    return "\n".join(lines)
