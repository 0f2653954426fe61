"""Equations of docstrings as a terminal shows them."""

import re

import pytest

from moejax import gating
from moejax.cli.equations import readable
from moejax.cli.show import gate_page, gates_table


def formulas(latex: str) -> list[str]:
    return [line.strip() for line in readable(f".. math::\n   {latex}").splitlines()]


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"h = x W, \quad S = \operatorname{top}_k(h)", ["h = x W", "S = top_k(h)"]),
        (r"\frac{e^{h_e}}{\sum_{j \in J} e^{h_j}}", ["e^h_e / (Σ_(j ∈ J) e^h_j)"]),
        (r"a \frac{b + c}{d} e", ["a ((b + c) / d) e"]),  # not (b + c) / (d e)
        (r"W^\top u_{task}, \qquad 10^{-6}", ["Wᵀ u_task", "10^-6"]),
        (r"\bar n - \hat{x}_t \cdot \tilde g", ["n̄ - x̂_t · g̃"]),
        (r"b \leftarrow \sqrt{|v|^2 + \epsilon}", ["b ← √(|v|^2 + ε)"]),
        (r"|\{t : g_{te} > 0\}| \; (e \in S)", ["|{t : g_te > 0}| (e ∈ S)"]),
        (
            r"a = \begin{cases} 1 & \text{one} \\ 22 & \text{two} \end{cases}, \quad b = a",
            ["a =", "1    one", "22   two", "b = a"],
        ),
    ],
)
def test_latex_becomes_text_with_the_same_meaning(latex: str, text: list[str]):
    assert formulas(latex) == text


def test_a_formula_on_the_line_of_its_directive_is_recognised():
    text = readable("Head.\n\n.. math:: y = \\sum_e\n   f_e(x), \\quad\n   z = 1\n\nwith f.\n")
    assert text == "Head.\n\n    y = Σ_e f_e(x)\n    z = 1\n\nwith f."


def test_every_gate_is_listed_in_one_line_that_fits_without_truncation():
    head, _ = gates_table().split("\n\n")
    lines = head.splitlines()[1:]
    assert [line.split()[0] for line in lines] == gating.names()
    for line in gates_table().splitlines():
        assert len(line) <= 100 and not line.endswith("...")
    for line in lines:
        assert len(line.split()) > 4 and line.split()[1].split("/")[0] in ("causal", "future")


@pytest.mark.parametrize("name", gating.names())
def test_the_page_of_a_gate_has_no_latex_and_fits_into_100_columns(name: str):
    page = gate_page(name)
    assert page.startswith(f"{name}: ") and "config.moe.gate:" in page
    assert not re.search(r"\\[A-Za-z{,;]|\.\. math|:math:|``", page)
    assert max(map(len, page.splitlines())) <= 100
