"""Writes docs/config.md from the table of config fields: python scripts/make_config_docs.py"""

from pathlib import Path

from moejax.config import FIELDS, MAY_CHANGE, SECTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

INTRODUCTION = """\
# Config fields

<!-- Written by scripts/make_config_docs.py from moejax/schema.py: edit that, then run it again. -->

A config page (`configs/*.py`) sets fields of this tree; a command overrides them with
`--config.SECTION.FIELD=VALUE`. A value is read as the type of the field's default. `moejax config
--config=PAGE` prints the resolved tree.

`moe.gate` holds the gate's name and the gate's own fields, which `moejax gates` lists.
`--config.moe.gate.name=NAME` (in a page: `set_gate(config, NAME)`) brings that gate's fields at
their defaults and, for the preset of a published model, the other `moe` fields that it sets; fields
overridden in the same command win, in any order. Naming the gate that a page has already changes
nothing.
"""

RESUMING = """\
## Resuming

Running a command again in its workdir goes on from the last checkpoint. These fields may differ
then:

{fields}

Any other difference is refused.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section, text in SECTIONS.items():
        rows = [(n, f) for n, f in FIELDS.items() if n.rpartition(".")[0] == section]
        lines = [f"## {section}", "", text, "", "| field | default | values | meaning |"]
        lines.append("| --- | --- | --- | --- |")
        for name, field in rows:
            values = field.range.replace(" | ", ", ") or field.type.__name__
            default = repr(field.default).replace("'", '"')
            lines.append(f"| `{name}` | `{default}` | {values} | {field.comment} |")
        parts.append("\n".join(lines) + "\n")
    fields = ", ".join(f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in MAY_CHANGE)
    parts.append(RESUMING.format(fields=fields))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
