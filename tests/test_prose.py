"""Docstrings name their subject, in words that a reader of the field knows."""

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RIDDLE = re.compile(r"(What|Which|How|Whether|Where|Who|Whose|Of|When|Why)\b(?!:)")
"""The first word of a docstring that asks for its subject instead of naming it."""

COINED = re.compile(
    r"""
      so-manieth | no[ ]one's | under[ ]this[ ]roof | of[ ]which[ ]the[ ]end
    | \b(?:is|are|was|were|be|been|being)[ ](?:said|told)\b | \bwithout[ ]a[ ]word\b
    | \bgo(?:es)?[ ]on\b | \bis[ ]its[.] | \bmend(?:s|ed|ing)?\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Turns of phrase that read as translated: say "every n-th", "reports", "resumes", "otherwise"."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below the fields of a class included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


def offenders(folder: Path) -> dict[str, list[str]]:
    """Offending docstrings, by room: file, line, and the words."""
    found = collections.defaultdict(list)
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        room = path.parts[0].removesuffix(".py")
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8"))):
            flat = " ".join(text.split())
            opening = RIDDLE.match(flat)
            words = [opening[0]] if opening else []
            words += [match[0] for match in COINED.finditer(flat)]
            found[room] += [
                f"{path.as_posix()}:{line}: {word!r} in {flat[:60]!r}" for word in words
            ]
    return {room: lines for room, lines in found.items() if lines}


@pytest.mark.parametrize("folder", ["moejax", "configs", "experiments", "scripts"])
def test_no_docstring_opens_with_a_riddle_or_uses_a_coined_word(folder):
    found = offenders(ROOT / folder)
    counts = {room: len(lines) for room, lines in found.items()}
    assert not found, "\n".join(
        [f"{sum(counts.values())} in all, by room {counts}", *sum(found.values(), [])]
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("What a gate may see.", 1),
        ("Of several tasks, pairs by task.", 1),
        ("Whether it fits; it is said.", 2),
        ("Every so-manieth block is routed.", 1),
        ("The run goes on.", 1),
        ("Load a corpus. How it is split is in `split`.", 0),
        ("Offsets of the experts.", 0),
        ("Whatever is valid.", 0),
        ("Resume the run; a mendicant is no match.", 0),
    ],
)
def test_the_check_counts_the_offending_docstrings(tmp_path, text, count):
    (tmp_path / "module.py").write_text(f'x = 1\n"""{text}"""\n')
    assert sum(len(lines) for lines in offenders(tmp_path).values()) == count
