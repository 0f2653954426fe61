"""``moejax report``: its files, messages and refusals."""

import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moejax import cli
from tests.analysis import sweeps, workdirs

MIB = 2**20


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main(["report", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake gets."""
    status, out, err = call(capsys, *argv)
    assert status == 2 and out == "" and err.count("\n") == 1
    return err


def test_the_report_of_a_run_is_in_its_workdir_and_its_size_is_printed(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(tmp_path / "run")
    status, out, err = call(capsys, workdir)
    written = workdir / "report.html"
    assert (status, err) == (0, "")
    assert out == f"{written}  {written.stat().st_size / 1e6:.1f} MB\n"
    assert written.stat().st_size < 10 * MIB and b"<title>run</title>" in written.read_bytes()
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]


def test_a_sweep_gets_a_report_under_the_requested_name(tmp_path: Path, capsys: Any):
    folder = sweeps.write(tmp_path / "sweep", seeds=(0,))
    assert call(capsys, folder, "-o", tmp_path / "a.html")[0] == 0
    assert b"2 of 2 trials finished" in (tmp_path / "a.html").read_bytes()
    assert not (folder / "report.html").exists()


def test_an_older_report_is_replaced_by_an_equal_one(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(tmp_path / "run")
    call(capsys, workdir)
    first = (workdir / "report.html").read_bytes()
    call(capsys, workdir)
    assert (workdir / "report.html").read_bytes() == first


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are always UTF-8 there")
def test_a_folder_whose_name_is_no_utf_8_gets_a_report(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")))
    assert call(capsys, workdir, "-o", tmp_path / "a.html")[0] == 0


@pytest.mark.parametrize(
    ("place", "said"),
    [("nothing", "does not exist"), ("", "holds neither a run nor a sweep")],
)
def test_a_folder_with_neither_run_nor_sweep_is_refused(
    tmp_path: Path, capsys: Any, place: str, said: str
):
    err = refused(capsys, tmp_path / place)
    assert said in err and "config.json" in err and "sweep.json" in err


def test_impossible_outputs_are_refused_before_anything_is_read(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(tmp_path / "run")
    assert "is a folder" in refused(capsys, workdir, "-o", tmp_path)
    assert "does not exist" in refused(capsys, workdir, "-o", tmp_path / "no/such/a.html")
    (tmp_path / "file").touch()
    assert "is no folder" in refused(capsys, workdir, "-o", tmp_path / "file/a.html")


def test_a_full_disk_is_reported_in_one_line_and_leaves_the_old_report(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    workdir = workdirs.write(tmp_path / "run")
    (workdir / "report.html").write_text("old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refused(capsys, workdir)
    assert (workdir / "report.html").read_text() == "old"


def test_a_damaged_config_is_refused_by_name(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(tmp_path / "run")
    (workdir / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(capsys, workdir)


def test_the_leak_is_measured_on_a_run_and_on_some_sequences(tmp_path: Path, capsys: Any):
    workdir = workdirs.write(tmp_path / "run")
    assert "must be a number of sequences" in refused(capsys, workdir, "--measure-leak=0")
    folder = sweeps.write(tmp_path / "sweep", seeds=(0,))
    assert "trials/switch-seed0" in refused(capsys, folder, "--measure-leak=2")


# TensorBoard.


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a folder's event files, read by TensorFlow's own format definition."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length (8 bytes), its checksum (4), record, its checksum (4)
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + length
    return found


def test_rows_become_tensorboard_events_once(tmp_path: Path, capsys: Any):
    pytest.importorskip("tensorboardX")
    workdir = workdirs.write(tmp_path / "run")
    for _ in range(2):
        status, out, _ = call(capsys, workdir, "--tensorboard")
        assert status == 0 and f"tensorboard --logdir={workdir / 'tensorboard'}" in out
    found = events(workdir / "tensorboard")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], pytest.approx(r["loss"])) for r in rows if r["split"] == "train"]
    assert found["train/loss"] == expected
    assert found["timing/seconds_per_step"] == [(step, 0.5) for step in (10, 20, 30)]
    assert "train/moe/load" not in found and len(found["eval/bits_per_byte"]) == 2


def test_events_that_a_run_wrote_itself_are_left_as_they_are(tmp_path: Path, capsys: Any):
    pytest.importorskip("tensorboardX")
    workdir = workdirs.write(tmp_path / "run")
    (workdir / "tensorboard").mkdir()
    own = workdir / "tensorboard/events.out.tfevents.1.host"
    own.write_bytes(b"its own")
    assert "left alone" in call(capsys, workdir, "--tensorboard")[1]
    assert [path.read_bytes() for path in (workdir / "tensorboard").iterdir()] == [b"its own"]


def test_every_trial_of_a_sweep_is_exported(tmp_path: Path, capsys: Any):
    pytest.importorskip("tensorboardX")
    folder = sweeps.write(tmp_path / "sweep", seeds=(0,))
    assert call(capsys, folder, "--tensorboard")[0] == 0
    for trial in ("switch-seed0", "top_2-seed0"):
        assert len(events(folder / "trials" / trial / "tensorboard")["train/loss"]) == 3


def test_without_tensorboardx_the_extra_is_named(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    workdir, real = workdirs.write(tmp_path / "run"), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    err = refused(capsys, workdir, "--tensorboard")
    assert "--tensorboard needs tensorboardX; pip install 'moejax[tensorboard]'" in err
    assert not (workdir / "tensorboard").exists()
