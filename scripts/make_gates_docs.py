"""Writes the table of gates into docs/gates.md: python scripts/make_gates_docs.py"""

import inspect
import re
from pathlib import Path

from moejax import gating
from moejax.config import default, moe_config, set_gate
from moejax.show import phases

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gates.md"
BEGIN, END = "<!-- table: scripts/make_gates_docs.py -->", "<!-- end of table -->"


def table() -> str:
    """A row per name: experts per token, what trains it, what a token sees, where it is from."""
    lines = ["| name | experts per token | trained by | training | evaluation | paper (arXiv) |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in gating.names():
        gate, config = gating.make(name), default()
        set_gate(config, name)
        training, evaluation = phases(gate.visibility(moe_config(config)))
        text = gating.source(name) or inspect.getdoc(type(gate)) or ""
        papers = re.findall(r"arXiv\s+(\d{4}\.\d{4,5})", text)
        few, more = gate.columns(8), gate.columns(16)
        many = str(few) if few == more else "up to all"
        lines.append(
            f"| `{name}` | {many} | {gate.trained_by} | {training} | {evaluation} | "
            f"{', '.join(dict.fromkeys(papers))} |"
        )
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its table made anew."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
