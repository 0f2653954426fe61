r"""Equations of docstrings as text for a terminal: the LaTeX of ``.. math::`` in Unicode.

Only the LaTeX that docstrings here use: sub- and superscripts, fractions, roots, accents, cases,
Greek letters and operators. A command that is not known keeps its name, without the backslash.
"""

import re
import textwrap
import unicodedata

WIDTH = 98

_SYMBOLS = {
    "alpha": "α", "beta": "β", "epsilon": "ε", "lambda": "λ", "mu": "μ", "nu": "ν", "pi": "π",
    "sigma": "σ", "tau": "τ", "theta": "θ", "chi": "χ", "Pi": "Π", "ell": "ℓ", "sum": "Σ",
    "cdot": "·", "times": "×", "in": "∈", "to": "→", "leftarrow": "←", "sim": "~", "le": "≤",
    "ge": "≥", "neq": "≠", "infty": "∞", "top": "ᵀ", "lVert": "‖", "rVert": "‖", "lceil": "⌈",
    "rceil": "⌉", "lfloor": "⌊", "rfloor": "⌋", "ldots": "…", "dots": "…", "Big": "", "big": "",
    "left": "", "right": "", "quad": "\n", "qquad": "\n",
}  # fmt: skip
_ACCENTS = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}
_PLAIN = ("operatorname", "text", "mathrm", "mathbf")
_WIDE = (r"\;", r"\quad", r"\qquad")
_ESCAPED = {",": " ", ";": " ", " ": " ", "!": "", "\\": "\n"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)
_BLOCK = re.compile(r"^\.\. math::(.*\n(?:[ ]+.*\n?|\n(?=[ ]))*)", re.MULTILINE)


def readable(docstring: str) -> str:
    """The docstring with its equations one below the other, indented, and plain quotes."""
    text = _BLOCK.sub(lambda match: _block(match[1]), docstring.rstrip() + "\n")
    text = re.sub(r":math:`([^`]*)`", lambda match: " ".join(_formulas(match[1])), text)
    return text.replace("``", "`").rstrip()


def _block(latex: str) -> str:
    lines: list[str] = []
    for formula in _formulas(textwrap.dedent(latex)):
        first, *rest = formula.split("\n")
        lines += textwrap.wrap(first, WIDTH - 4, subsequent_indent="    ") + rest
    return "".join(f"    {line}\n" for line in lines)


def _formulas(latex: str) -> list[str]:
    """The formulas between wide spaces; the lines of cases belong to the formula before them."""
    cases: list[str] = []

    def kept(match: re.Match[str]) -> str:
        rows = [row.split("&") for row in match[1].split(r"\\") if row.strip()]
        cells = [[" ".join(_convert(cell).split()) for cell in row] for row in rows]
        width = max(len(row[0]) for row in cells)
        cases.append("".join(f"\n      {row[0]:<{width}}   {' '.join(row[1:])}" for row in cells))
        return f"\0{len(cases) - 1}\0"

    text = _convert(_CASES.sub(kept, latex))
    formulas = []
    for part in text.split("\n"):
        formula = " ".join(part.split()).removesuffix(",").replace(" ,", ",")
        if formula:
            formulas.append(re.sub(r" ?\0(\d+)\0,?", lambda match: cases[int(match[1])], formula))
    return formulas


def _convert(latex: str) -> str:
    return _Parser(_TOKEN.findall(latex.replace("\n", " "))).until("")


class _Parser:
    """Parser of tokens from left to right; arguments are groups in braces or single tokens."""

    def __init__(self, tokens: list[str]):
        self._tokens, self._at = tokens, 0

    def until(self, end: str) -> str:
        """Read up to and including the token ``end``; "" stands for the end of the text."""
        parts = []
        while self._at < len(self._tokens):
            token = self._next()
            if token == end:
                break
            parts.append(self._text_of(token))
        return "".join(parts)

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _argument(self) -> str:
        while self._at < len(self._tokens) and self._tokens[self._at].isspace():
            self._at += 1
        if self._at == len(self._tokens):
            return ""
        token = self._next()
        return self.until("}") if token == "{" else self._text_of(token)

    def _multiplies(self) -> bool:
        """True if a factor follows: neither the end, nor punctuation, nor a wider space."""
        rest = [token for token in self._tokens[self._at :] if not token.isspace()]
        return bool(rest) and rest[0] not in (*",.;+-=})&", *_WIDE)

    def _text_of(self, token: str) -> str:
        if token == "{":
            return self.until("}")
        if token in "_^":
            argument = self._argument().strip()
            return argument if argument == "ᵀ" else token + _grouped(argument)
        if not token.startswith("\\") or len(token) == 1:
            return " " if token.isspace() else token
        name = token[1:]
        if name == "frac":
            above, below = self._argument().strip(), self._argument().strip()
            fraction = f"{_grouped(above, product=True)} / {_grouped(below)}"
            # Before another factor, brackets: a / b c could be read as a / (b c).
            return f"({fraction})" if self._multiplies() else fraction
        if name == "sqrt":
            return f"√{_grouped(self._argument().strip())}"
        if name in _ACCENTS:
            of = self._argument()
            return unicodedata.normalize("NFC", of[:1] + _ACCENTS[name]) + of[1:]
        if name in _PLAIN:
            return self._argument()
        if not name[0].isalpha():
            return _ESCAPED.get(name, name)
        return _SYMBOLS.get(name, name)


def _grouped(text: str, product: bool = False) -> str:
    """Add brackets unless the text is a single name or number, or a ``product`` needs none."""
    allowed = r"[\w^·| \u0300-\u036f]+" if product else r"-?[\w\u0300-\u036f…]+"
    if re.fullmatch(allowed, text):
        return text
    return text if text.startswith("(") and _closes_last(text) else f"({text})"


def _closes_last(text: str) -> bool:
    """True if the bracket that opens the text is closed by its last character."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place == len(text) - 1
    return False
