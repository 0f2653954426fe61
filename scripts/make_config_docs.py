"""Writes docs/config.md from the table of config fields: python scripts/make_config_docs.py"""

from collections.abc import Iterable
from pathlib import Path

from moejax.config import FIELDS, MAY_CHANGE, SECTIONS, Field
from moejax.config.tasks import TASKS, TaskEntry, task_entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

INTRODUCTION = """\
# Config fields

<!-- Written by scripts/make_config_docs.py from moejax/config/table.py: edit that, and run it. -->

A config page (`configs/*.py`) sets fields of this tree; a command overrides them with
`--config.SECTION.FIELD=VALUE`. A value is read as the type of the field's default; a whole number
may be written 1000, 1_000 or 1e3, and is at most 2147483647 where nothing else is said. `moejax
config --config=PAGE` prints the resolved tree.

`moe.gate` holds the gate's name and the gate's own fields, which `moejax gates` lists.
`--config.moe.gate.name=NAME` (in a page: `set_gate(config, NAME)`) brings that gate's fields at
their defaults and, for the preset of a published model, the other `moe` fields that it sets; fields
overridden in the same command win, in any order. Naming the gate that a page has already changes
nothing.

A page also chooses the task (`default("images")` in a page; language if it does not say). Fields
that mean nothing to a task are missing from its tree, and its own are below `task`: see the end.
"""

RESUMING = """\
## Resuming

Running a command again in its workdir goes on from the last checkpoint. These fields may have
another value then; each change is kept in the run's history, in `config.json`, and shown in its
report. Any other difference is refused.

{fields}

A `cosine` or `wsd` schedule stretches over `train.steps`, so raising that makes the learning rate
go up again; a run says so when it starts. `optim.decay_steps` fixes the schedule's length on its
own: with the old number of steps the rate stays at its final value from there on. To train on at a
high rate and end whenever it is enough, use `optim.schedule=wsd` with a large `train.steps`, and
lower that when the decay is to begin.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section, text in SECTIONS.items():
        rows = [(n, f) for n, f in FIELDS.items() if n.rpartition(".")[0] == section]
        parts.append("\n".join([f"## {section}", "", text, "", *table(rows)]) + "\n")
    parts += [of_task(name, task_entry(name)) for name in TASKS]
    rows = ["| field | meaning |", "| --- | --- |"]
    rows += [f"| `{name}` | {FIELDS[name].comment} |" for name in MAY_CHANGE]
    parts.append(RESUMING.format(fields="\n".join(rows)))
    return "\n".join(parts)


def of_task(name: str, entry: TaskEntry) -> str:
    """What a task adds, leaves out and sets."""
    lines = [f"## Task `{name}`", ""]
    if entry.fields:
        lines += [*table((f"task.{own}", field) for own, field in entry.fields.items()), ""]
    sections = tuple(out for out in entry.without if out.endswith("."))
    single = [f"`{out}`" for out in entry.without if not out.startswith(sections)]
    for what, names in (
        ("Not used", [f"`{out}*`" for out in sections] + single),
        ("Used from these sections", [f"`{name}`" for name in entry.uses]),
        ("Other defaults", [f"`{field}={value}`" for field, value in entry.defaults.items()]),
    ):
        if names:
            lines += [f"{what}: {', '.join(names)}.", ""]
    if len(lines) == 2:
        lines += ["All of the fields above.", ""]
    return "\n".join(lines)


def table(rows: Iterable[tuple[str, Field]]) -> list[str]:
    """A table of fields."""
    lines = ["| field | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, field in rows:
        values = field.range.replace(" | ", ", ") or field.type.__name__
        default = repr(field.default).replace("'", '"')
        lines.append(f"| `{name}` | `{default}` | {values} | {field.comment} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
