"""The table of mutants fits the tree, and a surviving mutant is distinguished from a killed one."""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

from scripts import mutants
from scripts.mutants import MUTANTS, ROOT, Mutant, mutated

IDS = [mutant.name for mutant in MUTANTS]


def test_names_are_unique_words():
    assert len(set(IDS)) == len(IDS) > 0
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in IDS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_replaced_text_occurs_once_and_every_mutant_is_valid_python(mutant: Mutant):
    source = (ROOT / mutant.file).read_text()
    changed = mutated(mutant, source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), "it changes a program"


@functools.cache
def functions(test_file: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / test_file).read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_the_test_that_must_fail_for_a_mutant_exists_and_is_fast(mutant: Mutant):
    (found,) = [f for f in functions(mutant.test_file) if f.name == mutant.test]
    assert not any("mark.slow" in ast.unparse(mark) for mark in found.decorator_list)


def test_missing_and_repeated_text_is_reported():
    for source, count in (("", 0), ("x = 1\nx = 1\n", 2)):
        with pytest.raises(ValueError, match=f"^a: 'x = 1' occurs {count} times in b.py$"):
            mutated(Mutant("a", "b.py", "x = 1", "x = 2", "test_b.py", "test_x"), source)


@pytest.mark.slow
def test_a_mutant_that_no_test_detects_survives(tmp_path: Path, capsys, monkeypatch):
    """A source tree of one function with two outputs, only one of which its test checks."""
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x if x > 0 else 0\n")
    (tmp_path / "test_double.py").write_text(
        "from double import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    )
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    test = ("test_double.py", "test_double")
    table = (
        Mutant("factor", "double.py", "2 * x", "3 * x", *test),
        Mutant("other_branch", "double.py", "else 0", "else 1", *test),
        Mutant("no_python", "double.py", "return", "return return", *test),
    )
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "MUTANTS", table)
    assert mutants.main(["--only", "factor"]) == 0
    assert capsys.readouterr().out == "noticed factor\n1 of 1 mutants were noticed\n"
    assert mutants.main(["--only", "other"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "SURVIVES test_double.py::test_double: other_branch",
        "0 of 1 mutants were noticed",
    ]
    with pytest.raises(RuntimeError, match="^no_python: .* did not run"):
        mutants.main(["--only", "no_python"])
    assert "else 0" in (tmp_path / "double.py").read_text(), "the tree itself is left alone"
    (tmp_path / "test_double.py").write_text("def test_double():\n    assert False\n")
    assert mutants.main(["--only", "factor"]) == 2
    with pytest.raises(SystemExit) as caught:
        mutants.main(["--only", "nobody"])
    assert caught.value.code == 2
