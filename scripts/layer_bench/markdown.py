"""Pieces of the pages that are made from rows."""


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def ratio(row: dict, field: str) -> str:
    """Median and quartiles."""
    low, high = row[f"{field}_spread"]
    return f"{row[f'{field}_ratio']:.2f} [{low:.2f}, {high:.2f}]"
