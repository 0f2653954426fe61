"""Finding things in pages."""

from collections.abc import Iterator, Sequence

from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text, Warning


def walk(blocks: Sequence[Block]) -> Iterator[Block]:
    """Every block, also those of alternatives."""
    for block in blocks:
        yield block
        if isinstance(block, Choice):
            for inner in block.options.values():
                yield from walk(inner)


def figures(page: Page) -> dict[str, Figure]:
    return {block.name: block for block in walk(page.blocks) if isinstance(block, Figure)}


def table(page: Page, first: str) -> Table:
    """The table whose first column is called so."""
    return next(b for b in walk(page.blocks) if isinstance(b, Table) and b.header[0] == first)


def facts(page: Page, first: str) -> dict[str, str]:
    """The second column of that table, by the first."""
    return {row[0]: row[1] for row in table(page, first).rows}


def said(page: Page) -> str:
    """All texts and warnings."""
    return "\n".join(b.text for b in walk(page.blocks) if isinstance(b, Text | Warning))


def options(page: Page, label: str) -> list[str]:
    """The alternatives of a choice."""
    return next(
        [*b.options] for b in walk(page.blocks) if isinstance(b, Choice) and b.label == label
    )
