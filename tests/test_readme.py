"""The README's code and commands work as printed, and its links resolve."""

import ast
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import cli, gating
from moejax import config as moejax_config
from moejax.train import loop
from tests import meshes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/README.md")
]  # fmt: skip


MESHES = [None, *re.findall(r"make_mesh\((\{.*?\})\)", README)]


@pytest.mark.parametrize("shape", MESHES)
def test_the_layer_example_runs_with_and_without_its_mesh(shape):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shown, alone = {}, {}
    with meshes.entered(ast.literal_eval(shape) if shape else None):
        exec(code, shown)
    exec(code, alone)
    np.testing.assert_allclose(shown["y_BLD"], alone["y_BLD"], rtol=1e-5, atol=1e-6)
    assert shown["y_BLD"].shape == shown["x_BLD"].shape
    assert shown["info"].stats.load_E.sum() == 2 * 4 * 16
    assert not shown["info"].stats.dropped_E.any(), "the example is dropless"
    assert isinstance(shown["loss"], jax.Array)


def commands():
    """Every `moejax ...` line of the README, continued lines joined, comments cut."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    for block in (text for language, text in blocks if not language):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "moejax":
                yield words[1:]


READY = [
    words
    for words in commands()
    if words[0] in ("train", "config", "gates") and "--config=runs/olmoe" not in words
]
"""Those that need no run of the reader's. The tutorial that has the one left out is a test too."""


@pytest.mark.parametrize("words", READY, ids=lambda words: "-".join(words[:2]))
def test_the_commands_parse_and_their_configs_are_valid(words, monkeypatch):
    """Each command up to the point where it would start work, without the user's own files."""
    words = [word for word in words if "data.path" not in word]
    started = []

    def run(config, *_, **__):
        started.append(moejax_config.validate(config))
        return 0

    monkeypatch.setattr(loop, "run", run)
    assert cli.main(words) == 0
    assert started or words[0] != "train"


def test_every_command_of_the_command_line_is_shown():
    shown = {words[0] for words in commands()}
    assert shown == set(cli.build_parser()[1])


def test_every_gate_is_named():
    for name in gating.names():
        assert f"`{name}`" in README


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_readme_names_where_to_start_reading():
    first_screen = README[: README.index("## Guarantees")]
    assert "experiments/minimal_lm.py" in first_screen and "make train" in first_screen
    tutorials = {path.name for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert len(tutorials) == 5
    assert all(f"docs/tutorials/{name}" in first_screen for name in tutorials)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if ":" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []
