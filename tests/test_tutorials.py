"""Each tutorial does what it says, in an empty folder.

Blocks of a page run in order. A block without a language holds commands. A block of Python that
opens with a docstring is saved as the file that the page names, and any other runs in one process
with those before it. A block of `text` quotes lines of the output of the block before it; numbers
may differ by a quarter, because other Python versions have another standard library.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import of_a_user

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])")
MARK = "---- output of the next block ----"

pytestmark = pytest.mark.slow


def execute(words: list[str], folder: Path) -> str:
    """The output of a command in a user's environment."""
    path = os.pathsep.join([str(ROOT), str(folder)])
    ended = subprocess.run(
        words,
        cwd=folder,
        env={**of_a_user(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_output(quoted: str, printed: str) -> None:
    """Every quoted line begins a printed one, in order, up to numbers."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for wanted in (" ".join(line.split()) for line in quoted.splitlines()):
        pattern = r"([\d.]+)".join(map(re.escape, NUMBER.split(wanted)))
        match = None
        while lines and match is None:
            match = re.match(pattern, lines.pop(0))
        assert match is not None, f"{wanted!r} is not in\n{printed}"
        numbers = [float(x) for x in NUMBER.findall(wanted)]
        assert [float(x.rstrip(".")) for x in match.groups()] == pytest.approx(numbers, rel=0.25)


def follow(page: str, folder: Path) -> None:
    """Runs the blocks of a page."""
    printed, session = "", ""
    for language, block in BLOCK.findall((TUTORIALS / page).read_text(encoding="utf-8")):
        if language == "text":
            check_output(block, printed)
        elif language == "python" and block.startswith('"""'):
            text = (TUTORIALS / page).read_text(encoding="utf-8")
            (name,) = re.findall(r"Save this as `(\w+\.py)`", text)
            (folder / name).write_text(block, encoding="utf-8")
        elif language == "python":
            session += f"print({MARK!r})\n{block}"
            printed = execute([sys.executable, "-c", session], folder).split(MARK)[-1]
        else:
            for words in commands(block):
                assert words[0] == "moejax", words
                printed = execute([sys.executable, "-m", *words], folder)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder of the first tutorial, after it."""
    folder = tmp_path_factory.mktemp("first")
    follow("first-run.md", folder)
    return folder


def test_the_tutorial_on_a_first_run_trains_and_resumes(first_run):
    workdir = first_run / "runs" / "first"
    assert {"summary.png", "config.json", "metrics.jsonl"} <= {p.name for p in workdir.iterdir()}
    assert (workdir / "checkpoints" / "80").is_dir()


def test_the_tutorial_on_reading_a_report_works(first_run):
    follow("read-a-report.md", first_run)
    report = (first_run / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    for page in ("Overview", "Load", "Drops", "Router", "Specialisation"):
        assert f">{page}<" in report


def test_the_tutorial_on_comparing_gates_works(tmp_path):
    follow("compare-gates.md", tmp_path)
    folder = tmp_path / "runs" / "compare"
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 4
    assert (folder / "report.html").is_file() and (folder / "sweep.png").is_file()


def test_the_tutorial_on_writing_a_gate_works(tmp_path):
    follow("write-a-gate.md", tmp_path)
    assert (tmp_path / "runs" / "cosine" / "summary.png").is_file()


def test_the_tutorial_on_a_published_model_converts_it_both_ways(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'parity' (torch, transformers)")
    follow("published-model.md", tmp_path)
    report = (tmp_path / "runs" / "olmoe" / "report.html").read_text(encoding="utf-8")
    for page in ("Load", "Router", "Specialisation"):
        assert f">{page}<" in report
