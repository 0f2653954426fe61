"""Rows read back exactly, and are neither lost nor doubled by a kill and a resume."""

import json
import math
import resource
import sys
import time
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.record.files import read_rows
from moejax.train.metrics import mirrors
from moejax.train.metrics.log import MetricsLog


def train_row(step: int) -> dict:
    return {"step": step, "split": "train", "loss": 1 / (step + 3), "moe/load": [[step, 1], [2, 3]]}


def write_run(workdir, steps, resume_step=None) -> None:
    with MetricsLog(workdir, resume_step) as log:
        for step in steps:
            log.write(train_row(step))
            log.timing({"step": step, "seconds": 0.1 * step})


def test_every_float_and_array_reads_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    doubles = rng.integers(0, 2**63, 200, dtype=np.uint64).view(np.float64)  # any bit pattern
    row = {
        "step": np.int32(7),
        "doubles": doubles[~np.isnan(doubles)],
        "single": np.float32(0.1),
        "device": jnp.float32(0.1),
        "half": jnp.asarray([0.1, 3e38], jnp.bfloat16),
        "counts": jnp.arange(6).reshape(2, 3),
        "flags": [np.bool_(True), False, None, "text"],
        "nested": {"x": (1, np.float64(5e-324))},
    }
    with MetricsLog(tmp_path, None) as log:
        log.write(row)
    (back,) = read_rows(tmp_path / "metrics.jsonl")
    assert list(back) == list(row) and back["step"] == 7
    assert np.array(back["doubles"]).tobytes() == row["doubles"].tobytes()
    assert back["single"] == back["device"] == float(np.float32(0.1))
    assert back["half"] == [float(jnp.bfloat16(0.1)), float(jnp.bfloat16(3e38))]
    assert back["counts"] == [[0, 1, 2], [3, 4, 5]]
    assert back["flags"] == [True, False, None, "text"]
    assert back["nested"] == {"x": [1, 5e-324]}


def test_infinite_values_and_nan_are_valid_json_and_come_back(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        log.write({"step": 1, "loss": jnp.nan, "grads": [np.inf, -math.inf, np.float32("nan")]})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(text, parse_constant=refuse)
    assert row["grads"] == ["Infinity", "-Infinity", "NaN"] and math.isnan(float(row["loss"]))
    (back,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(back["loss"]) and back["grads"][:2] == [math.inf, -math.inf]


@pytest.mark.parametrize("torn", [b"", b'{"step": 7, "los', b'{"step": 7}', b"\0\0\0"])
def test_a_killed_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(torn, tmp_path):
    write_run(tmp_path / "whole", range(1, 9))
    write_run(tmp_path / "killed", range(1, 7))
    for name in ("metrics.jsonl", "timings.jsonl"):
        with open(tmp_path / "killed" / name, "ab") as file:
            file.write(torn)
    write_run(tmp_path / "killed", range(5, 9), resume_step=4)
    for name in ("metrics.jsonl", "timings.jsonl"):
        whole, killed = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed
    assert [row["step"] for row in read_rows(tmp_path / "killed" / "metrics.jsonl")] == [
        *range(1, 9)
    ]
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_rows_up_to_the_restored_step_stay_and_minus_one_starts_over(tmp_path):
    write_run(tmp_path, [0, 3, 3, 6])
    write_run(tmp_path, [], resume_step=3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 3, 3]
    write_run(tmp_path, [], resume_step=-1)
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_fresh_run_refuses_a_workdir_with_rows_and_accepts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    write_run(tmp_path, [1])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="metrics.jsonl already holds rows"):
        MetricsLog(tmp_path, None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_reader_gets_whole_rows_while_the_run_writes(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        log.write(train_row(1))
        assert read_rows(tmp_path / "metrics.jsonl") == [train_row(1)]  # without a flush
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 2, "lo')
        assert read_rows(tmp_path / "metrics.jsonl") == [train_row(1)]


@pytest.mark.parametrize("line", [b"half a ro", b"[1]", b'{"loss": 1}', b""])
def test_a_broken_line_in_the_middle_is_named_not_skipped(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for read in (read_rows, lambda _: MetricsLog(tmp_path, 3)):
        with pytest.raises(UserError, match="metrics.jsonl: line 2 is not a row"):
            read(path)


def test_a_row_without_an_integer_step_is_refused(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        for row in ({"loss": 1.0}, {"step": 1.5}):
            with pytest.raises(ValueError, match="integer step"):
                log.write(row)
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_is_one_clear_error_and_the_torn_row_is_dropped(tmp_path):
    write_run(tmp_path, [1])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, 1) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            for message in ("disk is full", "File too large"):
                with pytest.raises(
                    UserError, match=f"metrics.jsonl cannot be written: .*{message}"
                ):
                    log.write(train_row(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_rows(tmp_path / "metrics.jsonl") == [train_row(1)]
    write_run(tmp_path, [2], resume_step=1)
    assert read_rows(tmp_path / "metrics.jsonl") == [train_row(1), train_row(2)]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write_run(tmp_path / "run", [1, 2])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_scalars(tmp_path):
    reader = pytest.importorskip("tensorboardX").proto.event_pb2.Event
    with MetricsLog(tmp_path, None, tensorboard=True) as log:
        log.write({**train_row(1), "flag": True})
        log.timing({"step": 1, "seconds": 2.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    seen = {}
    data = file.read_bytes()
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        for value in reader.FromString(data[12 : 12 + length]).summary.value:
            seen[value.tag] = value.simple_value
        data = data[16 + length :]
    assert seen == {"train/loss": 0.25, "timing/seconds": 2.0}


def test_tensorboard_without_the_extra_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="report.tensorboard=True needs tensorboardX"):
        MetricsLog(tmp_path, None, tensorboard=True)


class FakeWandb(types.ModuleType):
    """The part of wandb that is called, with a record of the calls."""

    class Settings(dict):
        pass

    def __init__(self, problem: str = ""):
        super().__init__("wandb")
        self.Error = type("Error", (Exception,), {})
        self.problem, self.begun, self.logged, self.finished = problem, [], [], 0

    def init(self, **how):
        if self.problem:
            raise self.Error(self.problem)
        self.begun.append(how)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_scalars_and_a_resumed_run_continues_the_same_one(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 1):
        with MetricsLog(tmp_path / "run", resume_step, wandb=True) as log:
            log.write({**train_row(2 if resume_step else 1), "flag": True})
            log.timing({"step": 2, "seconds": 2.0})
    assert fake.logged == [
        (1, {"train/loss": 0.25}),
        (2, {"timing/seconds": 2.0}),
        (2, {"train/loss": 0.2}),
        (2, {"timing/seconds": 2.0}),
    ]
    first, second = fake.begun
    assert first == second and fake.finished == 2
    assert first["name"] == "run" and first["dir"] == str(tmp_path / "run")
    assert first["id"] == (tmp_path / "run" / ".wandb-id").read_text()


def test_wandb_that_is_missing_or_does_not_start_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="report.wandb=True needs wandb; pip install 'moejax"):
        MetricsLog(tmp_path, None, wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key\nconfigured"))
    with pytest.raises(UserError, match=r"\(no API key configured\).*WANDB_MODE=offline"):
        MetricsLog(tmp_path, None, wandb=True)


def test_wandb_without_an_account_is_refused_before_anything_is_created(monkeypatch):
    fake: Any = FakeWandb()
    settings = types.SimpleNamespace(mode="online")
    fake.setup = lambda: types.SimpleNamespace(settings=settings)
    fake.login = lambda prompt, verify: prompt or verify  # as without an account
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="it has no account here.*wandb login.*WANDB_MODE"):
        mirrors.check(tensorboard=False, wandb=True)
    settings.mode = "offline"
    mirrors.check(tensorboard=False, wandb=True)
    assert not fake.begun


@pytest.mark.slow
def test_the_real_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsLog(tmp_path, None, wandb=True) as log:
        log.write(train_row(1))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"train/loss" not in file.read_bytes():  # its own process writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (tmp_path / ".wandb-id").read_text() in file.name
