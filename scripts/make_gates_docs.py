"""Write the table of gates into docs/gates.md: python scripts/make_gates_docs.py"""

from pathlib import Path

from moejax import gating
from moejax.cli.show import COLUMNS, gate_row

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gates.md"
BEGIN, END = "<!-- table: scripts/make_gates_docs.py -->", "<!-- end of table -->"


def table() -> str:
    """A row per name: what a token sees, what trains the gate, its cost, where it is from."""
    names = ("name", "trained by", *COLUMNS)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for name in gating.names():
        cells = (f"`{name}`", gating.make(name).trained_by, *gate_row(name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its table rewritten."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
