"""A run whose workdir has lost a part, or holds one of another run or version."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moejax.cli import eval as evaluation
from moejax.config import default, saved, to_dict, versions
from moejax.config.field import Field
from moejax.errors import UserError
from moejax.record import files
from moejax.train.metrics.log import Gap, MetricsLog
from moejax.train.workdir import contents as workdirs
from tests.train import runs
from tests.train.runs import STEPS, call, command, copy, refused
from tests.train.sharing import Whole


def edit(workdir: Path, **changes: Any) -> dict[str, Any]:
    """Sets or removes (None) entries of config.json."""
    content = {**json.loads((workdir / "config.json").read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    (workdir / "config.json").write_text(json.dumps(content))
    return content


def history(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "config.json").read_text())["history"]


@pytest.fixture
def half(whole: Whole, tmp_path: Path) -> Path:
    """The run as a kill before update 8 left it: checkpoints 3 and 6 are there."""
    return copy(whole.moments / "8", tmp_path / "half")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("how", ["removed", "not mounted", "saves not written down"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_nothing_is_overwritten(
    how: str, half: Path, text: Path
):
    shutil.rmtree(half / "checkpoints")
    if how == "not mounted":
        (half / "checkpoints").mkdir()
    if how == "saves not written down":
        (half / "saved.json").unlink()
    before = runs.files(half)
    refused(command(half, text), f"{half}/checkpoints", "saved step", "--restart", "mount")
    refused(["eval", f"--workdir={half}"], f"{half}/checkpoints", "put the folder back")
    assert runs.files(half) == before


def test_a_finished_run_whose_checkpoints_are_gone_is_refused(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    refused(command(workdir, text), f"the run saved step {STEPS}", "--restart")
    (workdir / "saved.json").unlink()
    (workdir / "summary.png").touch()
    refused(command(workdir, text), f"the run saved step {STEPS}", "--restart")


def test_restart_starts_at_step_0_and_keeps_the_old_logs(half: Path, whole: Whole, text: Path):
    shutil.rmtree(half / "checkpoints")
    logged = (half / "metrics.jsonl").read_bytes()
    old = json.loads((half / "config.json").read_text())
    ended = call([*command(half, text), "--restart"])
    assert ended.status == 0 and "resuming" not in ended.out
    assert (half / "before-restart-0/metrics.jsonl").read_bytes() == logged
    assert (half / "metrics.jsonl").read_bytes() == (whole.workdir / "metrics.jsonl").read_bytes()
    new = json.loads((half / "config.json").read_text())
    assert new["id"] != old["id"], "the old checkpoints, found again, are another run's"
    assert [entry.get("restarted") for entry in new["history"]] == [True]


def test_restart_is_refused_if_there_are_checkpoints(half: Path, text: Path):
    before = runs.files(half)
    refused([*command(half, text), "--restart"], "--restart", "checkpoint 6", "leave the flag out")
    assert runs.files(half) == before


@pytest.mark.slow
def test_a_missing_newest_checkpoint_is_reported_and_the_one_before_is_used(
    half: Path, whole: Whole, text: Path
):
    (half / "saved.json").write_text('{"steps": [3, 6]}')
    shutil.rmtree(half / "checkpoints/6")
    ended = call(command(half, text))
    assert ended.status == 0 and f"resuming {half} at step 3" in ended.out
    assert ended.err.count("\n") == 1 and "checkpoint 6 is missing" in ended.err
    assert [entry.get("missing") for entry in history(half)] == ["checkpoints/6"]
    runs.same_run(half, whole.workdir, whole.run)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.moments / "3", tmp_path / "run")
    assert not runs.steps(workdir) and not (workdir / "saved.json").exists()
    ended = call(command(workdir, text))
    assert (ended.status, ended.err) == (0, "")
    runs.same_run(workdir, whole.workdir, whole.run)


def test_the_last_certain_save_follows_from_rows_and_folder(tmp_path: Path):
    train = {"checkpoint_every": 10, "steps": 100}
    known = {"config": {"train": train}}
    for last, folder, expected in (
        (10, False, 0), (11, False, 10), (25, False, 20),
        (10, True, 0), (20, True, 0), (21, True, 10), (35, True, 20),
    ):  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": last}) + "\n")
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        if folder:
            (tmp_path / "checkpoints").mkdir()
        assert workdirs.last_saved(tmp_path, known) == expected, (last, folder)


# ---------------------------------------------------------------- config.json


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "empty", "cut"])
def test_config_json_is_rebuilt_from_a_checkpoint(
    how: str, half: Path, whole: Whole, text: Path, monkeypatch: pytest.MonkeyPatch
):
    path = half / "config.json"
    content = path.read_bytes()
    path.unlink() if how == "deleted" else path.write_bytes(content[: 700 if how == "cut" else 0])
    monkeypatch.setattr(saved, "_printed", set())
    ended = call(["eval", f"--workdir={half}"])
    assert ended.status == 0 and json.loads(ended.out)["step"] == 6
    assert ended.err.count("\n") == 1 and "config.json is missing or damaged" in ended.err
    assert "checkpoint 6" in ended.err
    assert call(["report", str(half)]).status == 0
    assert call(command(half, text)).status == 0
    runs.same_run(half, whole.workdir, whole.run)
    assert json.loads(path.read_text())["id"] == json.loads(content)["id"]


def test_a_finished_run_gets_its_config_json_back(whole: Whole, text: Path, tmp_path: Path):
    workdir = copy(whole.workdir, tmp_path / "run")
    (workdir / "config.json").unlink()
    ended = call(command(workdir, text))
    assert ended.status == 0 and "is complete" in ended.out
    assert runs.config_of(workdir) == runs.config_of(whole.workdir)


def test_a_lost_config_json_without_a_checkpoint_is_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        saved.read_config(tmp_path)


def test_the_config_json_of_a_run_without_git_is_intact(whole: Whole, tmp_path: Path, capsys):
    content = json.loads((whole.workdir / "config.json").read_text()) | {"commit": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert saved.read_config(tmp_path)["commit"] is None
    assert saved.is_readable(tmp_path) and capsys.readouterr().err == ""


MISSHAPEN: dict[str, Any] = {
    "train": 5,
    "train.steps": 9.0,
    "train.checkpoint_every": 0,
    "optim.learning_rate": "0.01",
    "optim.weight_decay": float("nan"),
    "optim.eps": 10**400,
    "moe.gate.name": 5,
    "model.tie_embeddings": None,
    "environment": None,
    "id": 5,
    "history": [{}],
    "baselines": {"bigram": "low"},
    "flops": {"train": {"fixed": None}},
    "units": {"item": "token", "tokens_per_row": "16"},
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_an_impossible_value_in_config_json_counts_as_corrupt(
    name: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    workdir = copy(whole.workdir, tmp_path / "run")
    content = json.loads((workdir / "config.json").read_text())
    *sections, leaf = name.split(".")
    tree = content if leaf in content else content["config"]
    for section in sections:
        tree = tree[section]
    assert leaf in tree
    tree[leaf] = MISSHAPEN[name]
    (workdir / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(saved, "_printed", set())
    assert saved.read_config(workdir) == saved.read_config(whole.workdir)
    assert "config.json is missing or damaged" in capsys.readouterr().err
    shutil.rmtree(workdir / "checkpoints")
    for argv in (["eval", f"--workdir={workdir}"], ["config", f"--workdir={workdir}"]):
        refused(argv, f"{workdir}/config.json", name)


def test_json_that_is_nested_too_deeply_counts_as_corrupt(tmp_path: Path):
    deep = "[" * 100_000
    for name in ("config.json", "saved.json", "metrics.jsonl", "checkpoints/1/meta/metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{deep}\n")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON \(it is nested"):
        saved.read_config(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not a row"):
        files.read_rows(tmp_path / "metrics.jsonl")
    assert saved.noted_steps(tmp_path) == []
    assert saved.read_manifest(tmp_path / "checkpoints", 1) is None


def test_an_unreadable_log_is_reported_in_one_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (files.read_rows, files.last_row):
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
            read(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"timings\.jsonl does not exist: is .* the workdir"):
        files.read_rows(tmp_path / "timings.jsonl")


def test_an_evaluation_in_a_few_lines_needs_no_config_json(whole: Whole, tmp_path: Path):
    workdir = copy(whole.workdir, tmp_path / "run")
    (workdir / "config.json").unlink()
    lines = evaluation._lines({"loss": 1.5, "step": STEPS}, str(workdir), whole.run.config)
    assert lines[0].endswith(f"1.5000 nats/byte  at step {STEPS}") and "bigram" in lines[1]


# ---------------------------------------------------------------- versions


def test_a_run_of_a_newer_version_is_refused_in_one_line(half: Path, text: Path):
    edit(half, schema=versions.SCHEMA + 1, baselines=None, config={"new": {"field": 1}})
    for argv in (command(half, text), ["eval", f"--workdir={half}"], ["report", str(half)]):
        ended = call(argv)
        assert ended.status == 2 and ended.err.count("\n") == 1, ended.err
        assert f"schema {versions.SCHEMA + 1}" in ended.err and "upgrade" in ended.err


@pytest.mark.slow
def test_a_field_unknown_to_an_older_version_gets_its_meaning_there(
    half: Path, whole: Whole, text: Path
):
    config = json.loads((half / "config.json").read_text())["config"]
    del config["moe"]["reroute"], config["optim"]["decay_steps"], config["moe"]["gate"]["k"]
    edit(half, schema=0, config=config)
    assert call(["eval", f"--workdir={half}"]).status == 0
    ended = call(command(half, text))
    assert (ended.status, ended.err) == (0, "")
    runs.same_run(half, whole.workdir, whole.run)


def test_added_renamed_and_removed_fields_are_read(monkeypatch: pytest.MonkeyPatch):
    tree = to_dict(default())
    old = json.loads(json.dumps(tree))
    del old["moe"]["reroute"]
    old["train"]["every"] = old["train"].pop("log_every") + 3
    old["moe"]["magic"] = 0
    changes = (
        versions.Change(versions.SCHEMA + 1, "train.every", now="train.log_every"),
        versions.Change(versions.SCHEMA + 1, "moe.magic", off=0),
    )
    monkeypatch.setattr(versions, "CHANGES", changes)
    monkeypatch.setattr(versions, "SCHEMA", versions.SCHEMA + 1)
    field = Field(0, "times", before=4)
    monkeypatch.setitem(versions.FIELDS, "moe.reroute", field)
    read, added = versions.migrated(old, 1, "old")
    assert added == ["moe.reroute"] and read["moe"]["reroute"] == 4
    assert read["train"]["log_every"] == tree["train"]["log_every"] + 3
    assert "magic" not in read["moe"] and "every" not in read["train"]
    old["moe"]["magic"] = 7
    with pytest.raises(UserError, match="moe.magic=7, which this version"):
        versions.migrated(old, 1, "old")


# ---------------------------------------------------------------- another run's checkpoint


def test_a_checkpoint_of_another_run_is_refused_with_both_ids(
    half: Path, whole: Whole, text: Path, tmp_path: Path
):
    other = copy(whole.workdir, tmp_path / "other")
    shutil.rmtree(other / "checkpoints/6")
    theirs = json.loads((other / "config.json").read_text())["id"]
    own = "0123456789abcdef"
    edit(half, id=own)
    shutil.rmtree(half / "checkpoints")
    shutil.copytree(other / "checkpoints", half / "checkpoints")
    for argv in (command(half, text), ["eval", f"--workdir={half}"]):
        refused(argv, f"checkpoint {STEPS}", own, theirs)
    new = tmp_path / "new"
    argv = command(new, text, train__init_from=half)
    refused(argv, f"train.init_from='{half}'", own, theirs)


def test_a_copied_workdir_resumes(half: Path, whole: Whole, text: Path, tmp_path: Path):
    moved = copy(half, tmp_path / "moved")
    ended = call(command(moved, text))
    assert (ended.status, ended.err) == (0, "")
    runs.same_run(moved, whole.workdir, whole.run)


# ---------------------------------------------------------------- rows


@pytest.mark.slow
@pytest.mark.parametrize("log", ["metrics.jsonl", "timings.jsonl"])
@pytest.mark.parametrize("how", ["cut", "removed", "altered"])
def test_rows_missing_at_a_resume_are_reported_and_kept_in_the_history(
    log: str, how: str, half: Path, text: Path
):
    lines = (half / log).read_text().splitlines(keepends=True)
    there = sum(json.loads(line)["step"] <= 6 for line in lines)
    if how == "removed":
        (half / log).unlink()
    elif how == "cut":
        (half / log).write_text("".join(lines[1:]))
    else:
        row = json.loads(lines[0])
        key = "loss" if "loss" in row else "elapsed"
        lines[0] = json.dumps({**row, key: 1.0}) + "\n"
        (half / log).write_text("".join(lines))
    ended = call(command(half, text))
    assert ended.status == 0 and ended.err.count("\n") == 1 and log in ended.err
    lost = {"removed": there, "cut": 1, "altered": 0}[how]
    (entry,) = history(half)
    assert (entry["log"], entry["rows_missing"], entry["rows"]) == (log, lost, there)
    assert entry["step"] == 6
    # The checkpoints that follow count what is there: it is said once.
    shutil.rmtree(half / f"checkpoints/{STEPS}")
    ended = call(command(half, text))
    assert log in ended.err, "the checkpoint of step 6 still counts the old rows"


def test_a_log_removed_during_a_run_is_written_again(tmp_path: Path, capsys):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.write({"step": 1, "split": "train"})
        (tmp_path / "metrics.jsonl").unlink()
        log.write({"step": 2, "split": "train"})
        log.write({"step": 3, "split": "train"})
        counts = log.counts()["metrics.jsonl"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl was removed" in said
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in content.splitlines()] == [1, 2, 3]
    assert (counts.rows, counts.bytes) == (3, len(content)) and not log.gaps


def test_a_log_replaced_by_another_file_is_written_again_beside_it(tmp_path: Path, capsys):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.write({"step": 1, "split": "train"})
        (tmp_path / "edited").write_text("other\n")
        os.replace(tmp_path / "edited", tmp_path / "metrics.jsonl")
        log.write({"step": 2, "split": "train"})
    assert "replaced" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl.other-0").read_text() == "other\n"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_log_truncated_during_a_run_is_a_gap(tmp_path: Path, capsys):
    with MetricsLog(tmp_path, resume_step=None) as log:
        for step in (1, 2):
            log.write({"step": step, "split": "train"})
        os.truncate(tmp_path / "metrics.jsonl", 0)
        log.write({"step": 3, "split": "train"})
        assert log.gaps == [Gap("metrics.jsonl", 2, 2)]
        assert log.counts()["metrics.jsonl"].rows == 1
    assert "lacks 2 of the 2 rows" in capsys.readouterr().err


def test_removing_the_folder_of_a_log_ends_the_run_with_one_line(tmp_path: Path):
    with MetricsLog(tmp_path / "run", resume_step=None) as log:
        log.write({"step": 1, "split": "train"})
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="metrics.jsonl was removed"):
            log.write({"step": 2, "split": "train"})


def test_a_row_represents_the_steps_since_the_row_before_it():
    known = {"config": {"train": {"log_every": 10}}}
    steps, field = [10, 20, 50, 60], "train.log_every"
    assert saved.steps_per_row(steps, known, field) == [10, 10, 10, 10]
    assert saved.missing_steps(steps, known, field, 60) == [(21, 40)]
    assert saved.missing_steps(steps, known, field, 85) == [(21, 40), (61, 85)]
    assert saved.missing_steps([], known, field, 9) == []
    changed = [{"field": field, "step": 20, "old": 10, "new": 30}]
    known = {"config": {"train": {"log_every": 30}}, "history": changed}
    assert saved.missing_steps([10, 20, 30, 60, 90], known, field, 100) == []
    assert saved.missing_steps([20, 30, 90], known, field, 90) == [(1, 10), (31, 60)]


def test_missing_probe_files_are_reported(whole: Whole, text: Path, tmp_path: Path):
    assert workdirs.missing_probes(tmp_path, []) == []
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/step-00000007.npz").touch()
    lost = workdirs.missing_probes(tmp_path, [0, 7])
    assert lost == ["probe/step-00000000.npz", "probe/tokens.npz"]
