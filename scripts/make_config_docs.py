"""Write docs/config.md from the table of config fields: python scripts/make_config_docs.py"""

from collections.abc import Iterable
from pathlib import Path

from moejax.config import FIELDS, MAY_CHANGE, SECTIONS, Field
from moejax.config.tasks import TASKS, TaskEntry, task_entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

INTRODUCTION = """\
# Config fields

<!-- Written by scripts/make_config_docs.py from moejax/config/table.py: edit that and run it. -->

A config page (`configs/*.py`) sets fields of this tree, and a command overrides them with
`--config.SECTION.FIELD=VALUE`. Values are parsed as the type of the field's default. An integer
may be written as 1000, 1_000 or 1e3 and is at most 2147483647 unless the table gives another
limit. `moejax config --config=PAGE` prints the resolved tree.

`moe.gate` holds the name of the gate and the gate's own fields, which `moejax gates` lists.
`--config.moe.gate.name=NAME` (in a page: `set_gate(config, NAME)`) sets the fields of that gate to
their defaults. The preset of a published model also sets other `moe` fields. Fields overridden in
the same command take precedence, in any order. Naming the gate that the page already has changes
nothing.

A page also chooses the task, with `default("images")` for example; the default is language. A
task's tree omits the fields that mean nothing to it and has its own fields below `task`; see the
end of this page.
"""

RESUMING = """\
## Resuming

The same command resumes a run from the last checkpoint in its workdir. These fields may change on
resumption; every change is recorded in the run's history, in `config.json`, and shown in its
report. Any other difference is an error.

{fields}

A `cosine` or `wsd` schedule spans `train.steps`, so that raising `train.steps` raises the learning
rate again; the run prints a warning when it starts. `optim.decay_steps` sets the length of the
schedule separately: with the old number of steps, the rate stays at its final value from there on.
To train at a high rate for an open-ended time, use `optim.schedule=wsd` with a large
`train.steps`, and lower it when the decay should begin.
"""


def render() -> str:
    """The text of the page."""
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
    """The section of a task: the fields it adds and leaves out, and its own defaults."""
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
