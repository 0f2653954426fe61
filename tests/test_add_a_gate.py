"""The steps of docs/add-a-gate.md: its file, commands, exam and sweep, and its line in moejax."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import caching

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-gate.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
COMMANDS = [
    shlex.split(line)
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if line
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder of a user's with the page's two files, and the configs beside them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_gates.py").write_text(PYTHON[0])
    (folder / "my_sweep.py").write_text(PYTHON[1])
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def run(words, folder, environment=os.environ, **changes):
    """The command as a process of its own; ``moejax`` is the one of this checkout."""
    if words[0] == "moejax":
        words = [sys.executable, "-m", *words]
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        words,
        cwd=folder,
        env={**environment, "PYTHONPATH": path, **changes},
        capture_output=True,
        text=True,
        timeout=600,
    )


def commands(verb):
    found = [words for words in COMMANDS if words[:2] == ["moejax", verb]]
    assert found, f"the page shows no `moejax {verb}`"
    return found


@pytest.mark.slow
def test_the_gate_is_explained_and_trains_from_the_command_line(folder):
    (shown,) = commands("gates")
    page = run(shown, folder)
    assert page.returncode == 0 and "epsilon" in page.stdout and "explore" in page.stdout
    (train,) = commands("train")
    ended = run(train, folder, caching())
    assert ended.returncode == 0, ended.stderr
    assert (folder / "runs" / "greedy" / "summary.png").exists()


def test_a_value_out_of_its_range_is_reported_in_one_line(folder):
    (train,) = commands("train")
    wrong = [w.replace("epsilon=0.2", "epsilon=2.0").replace("runs/", "no/") for w in train]
    ended = run(wrong, folder)
    assert ended.returncode == 2 and "moe.gate.epsilon=2.0 must lie in" in ended.stderr
    assert ended.stderr.count("\n") == 1 and not (folder / "no").exists()


@pytest.mark.slow
def test_the_gate_passes_the_exam(folder):
    exams = [words for words in COMMANDS if words[:2] == ["make", "exam"]]
    assert len(exams) == 2
    own = exams[1][2].removeprefix("GATE=")
    target = re.search(r"^exam:.*?\n\n", (ROOT / "Makefile").read_text(), re.S | re.M)
    assert target is not None
    files = re.findall(r"tests/\S+\.py", target[0])
    skipped = re.search(r'-k "(.*?)"', target[0])
    assert len(files) == 3 and skipped is not None
    words = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "not slow", "-k", skipped[1]]
    ended = run([*words, *(str(ROOT / f) for f in files)], folder, MOEJAX_EXAM=own)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "5 passed" in ended.stdout, ended.stdout[-300:]


@pytest.mark.slow
def test_the_exam_names_the_phase_and_the_claim_that_a_gate_breaks(folder):
    """A gate that routes padding breaks a claim in both phases."""
    broken = PYTHON[0].replace("ops.masked(expert_GTK, weight_GTK, context.valid_GT)",
                               "Routing(expert_GTK, weight_GTK)")  # fmt: skip
    broken = broken.replace("import GateOutput", "import GateOutput, Routing")
    (folder / "broken_gates.py").write_text(broken)
    ended = run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "not slow",
         str(ROOT / "tests" / "test_gates.py")],
        folder, MOEJAX_EXAM="broken_gates:EpsilonGreedy",
    )  # fmt: skip
    assert ended.returncode == 1 and "2 failed" in ended.stdout, ended.stdout[-3000:]
    for phase in ("training", "evaluation"):
        assert f"EpsilonGreedy in {phase}: padding is never routed" in ended.stdout


@pytest.mark.slow
def test_the_gate_runs_in_a_sweep(folder):
    (sweep,) = commands("sweep")
    ended = run(sweep, folder, caching())
    assert ended.returncode == 0, ended.stderr
    table = (folder / "runs" / "greedy_sweep" / "results.csv").read_text()
    assert "greedy" in table and "switch" in table


IN_THE_TABLE = """
import moejax
from moejax import gating
from moejax.cli.show import gates_table
gate = gating.make("greedy", epsilon=0.5)
assert gate == gating.EpsilonGreedy(0.5) and "EpsilonGreedy" in gating.__all__
assert gating.fields("greedy")["epsilon"][1] == "share of tokens that explore in training"
assert "greedy" in gating.names() and "\\ngreedy " in gates_table()
print(moejax.__file__)
"""


def test_one_file_and_one_line_add_the_gate_to_moejax(tmp_path):
    """In a copy of the package: the page's file, and a line in ``GATES``."""
    shutil.copytree(ROOT / "moejax", tmp_path / "moejax", ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "moejax" / "gating" / "greedy.py").write_text(PYTHON[0])
    table = tmp_path / "moejax" / "gating" / "registry.py"
    opening, line = (
        "GATES: dict[str, Entry] = {\n",
        '    "greedy": Entry("greedy:EpsilonGreedy"),\n',
    )
    head, tail = table.read_text().split(opening)
    table.write_text(head + opening + line + tail)
    ended = subprocess.run(
        [sys.executable, "-c", IN_THE_TABLE],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(tmp_path / "moejax" / "__init__.py")
