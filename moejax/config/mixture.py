"""The field ``data.mixture``: several texts with weights, as a Python literal.

``{'web': ('web/*.jsonl', 0.7), 'code': ('code/', 0.3)}`` names two sources, where each is, and the
share of the rows of training that are from it. Weights are taken as the decimal numbers that are
written and divided by their sum, so that ``7`` and ``3`` mean exactly what ``0.7`` and ``0.3`` do.
"""

import ast
import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

from moejax.errors import UserError

FIELD = "data.mixture"
EXAMPLE = "{'web': ('web/*.jsonl', 0.7), 'code': ('code/', 0.3)}"
MOST = 256
"""The most sources of a mixture: recordings number them in one byte."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture. ``share``: of the rows, all shares sum to 1."""

    name: str
    path: str
    share: Fraction


def parts_of(text: str) -> tuple[Part, ...]:
    """The sources that the field names, in its order.

    Raises:
      UserError: it is no such literal; two sources have one name, a name that is no identifier, an
        empty path, or a weight that is not positive and finite.
    """
    try:
        literal = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refusal(text, "is not a Python literal") from error
    if not isinstance(literal, ast.Dict) or not literal.keys:
        raise _refusal(text, "is not a dictionary of sources")
    weights: dict[str, Fraction] = {}
    paths: dict[str, str] = {}
    for key, value in zip(literal.keys, literal.values, strict=True):
        name, content = _value(text, key), _value(text, value)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            begin = "a name begins with a letter and has up to 40 letters, digits, _ and -"
            raise _refusal(text, f"names a source {name!r}", begin)
        if name in weights:
            raise _refusal(text, f"names two sources {name!r}", "rename one")
        if not isinstance(content, (tuple, list)) or len(content) != 2:
            raise _refusal(text, f"has {content!r} for {name!r}, which is not (path, weight)")
        paths[name] = _path(text, name, content[0])
        weights[name] = _weight(text, name, content[1])
    if len(weights) > MOST:
        raise _refusal(text, f"names {len(weights)} sources", f"{MOST} is the most")
    total = sum(weights.values(), Fraction(0))
    return tuple(Part(name, paths[name], weight / total) for name, weight in weights.items())


def _value(text: str, node: ast.expr | None) -> Any:
    if node is None:  # {**other}
        raise _refusal(text, "is not a dictionary of sources")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise _refusal(text, f"holds {ast.unparse(node)}, which is not a literal") from error


def _path(text: str, name: str, path: Any) -> str:
    if not isinstance(path, str) or not path.strip():
        raise _refusal(text, f"has {path!r} as the path of {name!r}", "name files or a folder")
    return path


def _weight(text: str, name: str, weight: Any) -> Fraction:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise _refusal(text, f"gives {name!r} the weight {weight!r}", "use a number above 0")
    return Fraction(repr(weight))


def _refusal(text: str, problem: str, remedy: str = f"write it as {EXAMPLE}") -> UserError:
    return UserError(f"{FIELD}={text!r} {problem}; {remedy}")
