"""The command and the commit that config.json names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moejax
from moejax.train.workdir import origin
from tests.train.sharing import Whole


def git(folder: Path, *words: str) -> str:
    named = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *named, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository as the working directory, and sources that git does not track."""
    here, sources = tmp_path / "here", tmp_path / "sources"
    here.mkdir()
    sources.mkdir()
    git(here, "init", "-q")
    (here / "file").write_text("one")
    git(here, "add", "file")
    git(here, "commit", "-qm", "one")
    monkeypatch.chdir(here)
    monkeypatch.setattr(moejax, "__file__", str(sources / "__init__.py"))
    return here


def test_the_commit_is_the_working_directorys_if_the_sources_have_none(elsewhere: Path):
    commit = git(elsewhere, "rev-parse", "HEAD")
    assert origin.commit() == commit and len(commit) == 40
    (elsewhere / "new").write_text("untracked")
    assert origin.commit() == commit
    (elsewhere / "file").write_text("two")
    assert origin.commit() == f"{commit}-dirty"


def test_tracked_sources_come_first(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    sources = Path(moejax.__file__ or "").parent
    (sources / "__init__.py").touch()
    git(sources, "init", "-q")
    git(sources, "add", "__init__.py")
    git(sources, "commit", "-qm", "sources")
    assert origin.commit() == git(sources, "rev-parse", "HEAD")


def test_without_git_or_a_commit_the_commit_is_none(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(elsewhere.parent))
    monkeypatch.chdir(elsewhere.parent)
    assert origin.commit() is None
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    assert origin.commit() is None


def test_the_command_is_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/bin/moejax", "train", "--workdir=a b"])
    assert origin.origin()["command"] == "moejax train '--workdir=a b'"


def test_config_json_has_command_and_commit(whole: Whole):
    saved = json.loads((whole.workdir / "config.json").read_text())
    assert saved["command"] and saved["commit"] == origin.commit()
