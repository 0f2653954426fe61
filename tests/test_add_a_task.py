"""A task outside the package: a folder (``tests/majority``) and one line in its config page."""

import json
from pathlib import Path

import pytest

from moejax.config import default, load
from moejax.config.tasks import TASKS
from moejax.errors import UserError
from moejax.record.probe import Probe
from tests.train.runs import ROOT, call, refused, rows

PAGE = ROOT / "tests" / "majority" / "page.py"
NAME = "tests.majority.fields:TASK"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("majority") / "run"
    ended = call(["train", f"--config={PAGE}", f"--workdir={folder}"])
    assert (ended.status, ended.err) == (0, "")
    return folder


def test_the_package_does_not_name_the_task():
    assert NAME not in TASKS
    sources = (ROOT / "moejax").rglob("*.py")
    assert not [path for path in sources if "tests.majority" in path.read_text()]
    assert PAGE.read_text().count(NAME) == 1


def test_the_config_has_the_tasks_fields_and_leaves_out_what_it_does_not_use():
    config = load(str(PAGE), ["task.bits=6"]).config
    assert (config.task.name, config.task.bits, config.data.eval_fraction) == (NAME, 6, 0.25)
    assert "seq_len" not in config.train and "vocab_size" not in config.model
    refused(["config", f"--config={PAGE}", "--config.task.bits=1"], "task.bits=1", ">= 2 and <= 16")
    refused(["config", f"--config={PAGE}", "--config.train.seq_len=8"], "means nothing to task")


@pytest.mark.slow
def test_the_task_learns_and_is_evaluated_beside_its_baseline(workdir):
    trained, held_out = rows(workdir, "train"), rows(workdir, "eval")
    assert [row["step"] for row in trained] == list(range(1, 31))
    assert trained[0]["loss"] == pytest.approx(0.693, abs=1e-3)  # the head starts at 0
    assert [row["step"] for row in held_out] == [15, 30]
    assert held_out[-1]["loss"] < 0.5 and held_out[-1]["accuracy"] > 0.75
    assert all("aux/load_balance" in row for row in held_out)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["task"] == {"name": NAME, "bits": 7}
    assert saved["units"]["item"] == "vector"
    assert saved["baselines"] == {"chance": pytest.approx(0.693, abs=1e-3)}


@pytest.mark.slow
def test_a_saved_run_of_the_task_is_evaluated_and_resumed(workdir):
    last = rows(workdir, "eval")[-1]
    ended = call(["eval", f"--workdir={workdir}"])
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["loss"] == pytest.approx(last["loss"], rel=1e-5)
    again = ["train", f"--config={PAGE}", f"--workdir={workdir}", "--config.train.steps=32"]
    refused([*again, "--config.task.bits=5"], "task.bits")
    ended = call(again)
    assert (ended.status, rows(workdir, "train")[-1]["step"]) == (0, 32), ended.err


@pytest.mark.slow
def test_the_probe_names_its_tokens(workdir):
    probe = Probe.read(workdir)
    assert probe is not None
    assert list(probe.tokens["token_text"]) == ["0", "1", "mostly 0", "mostly 1"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("tests.majority.fields:TUSK", "cannot be imported: AttributeError"),
        ("tests.minority.fields:TASK", "cannot be imported: ModuleNotFoundError"),
        ("tests.majority.task:build", "is a function; name a moejax.config.tasks.TaskEntry"),
        ("image", "is unknown; did you mean 'images'"),
    ],
)
def test_an_unknown_task_name_is_refused_in_one_line(name: str, message: str):
    with pytest.raises(UserError, match=f"^task.name={name!r} {message}") as caught:
        default(name)
    assert "\n" not in str(caught.value)
