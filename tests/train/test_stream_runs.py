"""Runs on a stream: resumed in the middle of a block, on several meshes, and in two processes."""

import json
import re
from pathlib import Path

import pytest

from moejax.config import load
from moejax.data.stream import blocks, units
from moejax.train import setup
from tests.train import runs
from tests.train import test_two_processes as two
from tests.train.runs import PAGE, call, command, flags
from tests.train.sharing import Shared

STREAM = {"data__stream": True}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of the text is some 30 rows, in blocks of 5: a step takes 8 rows."""
    monkeypatch.setattr(units, "UNIT", 200)
    monkeypatch.setattr(blocks, "BLOCK", 5 * 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "corpus"
    folder.mkdir()
    for file in range(2):
        texts = [f"{n}: " + " ".join(["gate", "router", "expert"][: n % 4]) * 3 for n in range(7)]
        (folder / f"{file}.jsonl").write_text(
            "".join(json.dumps({"text": f"{file}.{text}"}) + "\n" for text in texts)
        )
    return folder


@pytest.fixture(scope="module")
def whole(text: Path, shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT", 200)
        patch.setattr(blocks, "BLOCK", 5 * 16)
        ended = call(command(workdir, text, **STREAM))
    assert (ended.status, ended.err) == (0, "")
    assert "order       files and their parts shuffled, then rows within blocks of 5\n" in ended.out
    assert "corpus: a stream, " in ended.out
    return workdir


def test_a_run_resumed_in_the_middle_of_a_block_or_an_epoch_ends_bit_equal(
    whole: Path, text: Path, tmp_path: Path
):
    workdir, noted = tmp_path / "run", []
    for steps in (1, 3, 5, 7, 8):
        ended = call(command(workdir, text, train__steps=steps, **STREAM))
        assert ended.status == 0, ended.err
        noted.append(_place(workdir, steps))
    assert {0, 1, 2} <= {place.epoch for place in noted}
    rows = [8 * steps - place.row for steps, place in zip((1, 3, 5, 7, 8), noted, strict=True)]
    assert set(rows) <= set(range(5)) and len(set(rows)) > 2  # all but one in the middle of a block
    run = setup.prepare(load(PAGE, flags(text, **STREAM)).config)
    assert runs.same_bits(runs.saved(workdir, run, 8), runs.saved(whole, run, 8))


def _place(workdir: Path, step: int) -> blocks.Place:
    """The note about the stream in the checkpoint of a step."""
    meta = (workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text()
    (found,) = re.findall(r'"position": (\[[\d, ]+\])', meta)
    return blocks.Place(*json.loads(found))


@pytest.mark.parametrize("mesh", [{"expert": 1}, {"data": 2, "expert": 4}])
def test_every_mesh_trains_on_the_same_rows(
    mesh: dict[str, int], whole: Path, text: Path, tmp_path
):
    """The losses of 1, 2 (``whole``) and 8 devices agree to rounding, as of a text in memory."""
    changes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    assert call(command(tmp_path / "run", text, **STREAM, **changes)).status == 0
    got, wanted = (runs.rows(workdir) for workdir in (tmp_path / "run", whole))
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), one["step"]


@pytest.mark.multiprocess
def test_two_processes_train_the_same_as_one(text: Path, tmp_path: Path):
    fields = {
        "data.path": text,
        "data.stream": True,
        "data.eval_fraction": 0.2,
        "train.seq_len": 16,
    }
    two.train_in_two(two.CONFIG, tmp_path / "two", **fields)
    two.finish(
        two.start("train", two.CONFIG, f"--workdir={tmp_path / 'one'}", *two.flags(**fields))
    )
    two.close(two.rows(tmp_path / "two"), two.rows(tmp_path / "one"))
