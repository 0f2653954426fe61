"""The wheel contains the config pages, and works in any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moejax.config import load, shipped

ROOT = Path(__file__).parent.parent


def test_a_page_of_the_repository_has_a_name():
    assert set(shipped.pages()) == {page.stem for page in (ROOT / "configs").glob("*.py")}
    for name in shipped.pages():
        assert load(name).config == load(f"{ROOT}/configs/{name}.py").config
    assert load("lm:gate=switch,size=debug").config.moe.gate.name == "switch"


def test_a_folder_without_a_run_does_not_hide_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lm").mkdir()
    assert load("lm").config == load(f"{ROOT}/configs/lm.py").config


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, built from a copy because building leaves files behind."""
    copy, made, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    without = shutil.ignore_patterns("__pycache__")
    for name in ("moejax", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=without)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(made), str(copy)], check=True)
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def run(site, folder, *words):
    """The output of the wheel's own command line, without the checkout on the path."""
    here = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "moejax", *words], cwd=folder, env=here, capture_output=True,
        text=True,
    )  # fmt: skip
    assert not found.returncode, found.stderr
    return found.stdout


@pytest.mark.slow
def test_the_wheel_has_every_page_and_what_the_report_needs(installed):
    pages = {page.stem for page in (installed / "moejax" / "configs").glob("*.py")}
    assert pages == {page.stem for page in (ROOT / "configs").glob("*.py")}
    assert (installed / "moejax" / "analysis" / "assets" / "report.js").is_file()
    assert not (installed / "tests").exists() and not (installed / "configs").exists()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "moejax").rglob("*.py")}
    assert modules <= {p.relative_to(installed).as_posix() for p in installed.rglob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["lm", "lm:gate=switch", "vit", "multitask", "multimodal"])
def test_a_page_of_the_wheel_is_found_by_name_in_any_folder(installed, tmp_path, page):
    assert "moe.gate:" in run(installed, tmp_path, "config", f"--config={page}")


@pytest.mark.slow
def test_a_wheel_trains_in_an_empty_folder(installed, tmp_path):
    small = [
        "--config.train.steps=2",
        "--config.mesh.expert=1",
        "--config.report.compile_cache=off",
    ]
    run(installed, tmp_path, "train", "--config=lm:size=debug", *small, "--workdir=run")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
