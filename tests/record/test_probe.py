"""The files of a probe: they are read as written, and damaged ones are named."""

import json
import time

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.record import probe
from moejax.record.probe import Probe
from moejax.train.probe.arrays import formats
from tests import probes


def read(workdir) -> Probe:
    found = Probe.read(workdir)
    assert found is not None
    return found


@pytest.mark.parametrize("optional", [True, False])
def test_saved_arrays_are_read_with_the_types_and_axes_of_the_table(optional, tmp_path):
    probes.write(tmp_path, steps=(20, 0, 10), labels=optional, router=optional)
    found = read(tmp_path)
    assert found.steps == [0, 10, 20] and found.problems == []
    tables = [
        (found.tokens, probes.tokens(labels=optional), probe.TOKENS),
        (
            found.at(10),
            probes.step(10, found.tokens["valid"], optional),
            formats(),
        ),
    ]
    sizes = {"M": 2, "N": 6, "L": 16, "K": 2, "E": 4, "V": 12, "C": 2}
    for arrays, given, table in tables:
        assert set(arrays) == set(given) and len(arrays) == len(given)
        assert ("label" in arrays or "router_similarity" in arrays) == optional
        for name, array in arrays.items():
            dtype, axes, _ = table[name]
            assert array.dtype.kind == "U" if dtype == "str" else array.dtype == dtype
            assert array.shape == tuple(sizes[axis] for axis in axes)
            np.testing.assert_array_equal(array, np.asarray(given[name]).astype(array.dtype))


def test_equal_arrays_give_equal_bytes_and_no_temporary_file_stays(tmp_path, monkeypatch):
    probes.write(tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    probes.write(tmp_path / "b")
    a, b = (
        {p.name: p.read_bytes() for p in probe.folder(tmp_path / run).iterdir()} for run in "ab"
    )
    assert a == b
    assert sorted(a) == [f"step-000000{n:02d}.npz" for n in (0, 10, 20)] + ["tokens.npz"]


def test_an_array_is_read_once(tmp_path):
    probes.write(tmp_path)
    found = read(tmp_path)
    assert found.at(0)["expert"] is found.at(0)["expert"]
    with pytest.raises(KeyError):
        found.at(0)["nothing"]
    with pytest.raises(KeyError):
        found.at(5)


def test_a_folder_without_a_probe_has_none(tmp_path):
    assert Probe.read(tmp_path) is None
    probe.folder(tmp_path).mkdir()
    assert Probe.read(tmp_path) is None


def test_a_missing_recording_of_step_0_is_reported(tmp_path):
    probes.write(tmp_path, steps=(10,))
    found = read(tmp_path)
    assert found.steps == [10]
    assert found.problems == [f"{probe.step_path(tmp_path, 0)} is missing"]


def test_torn_and_missing_steps_are_named_and_the_others_read(tmp_path):
    probes.write(tmp_path, steps=(0, 10, 20, 40))
    torn = probe.step_path(tmp_path, 10)
    torn.write_bytes(torn.read_bytes()[:-30])
    (probe.folder(tmp_path) / ".step-00000050.npz.tmp").write_bytes(b"half")
    evaluations = [json.dumps({"step": s, "split": "eval"}) for s in (10, 20, 30, 40)]
    rows = [*evaluations, json.dumps({"step": 35, "split": "train"}), '{"step": 50, "spl']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    found = read(tmp_path)
    assert found.steps == [0, 20, 40]
    assert found.problems == [
        f"{torn} cannot be read: it is torn or damaged",
        f"{probe.step_path(tmp_path, 30)} is missing",
    ]


def test_a_flipped_byte_is_found_when_its_array_is_read(tmp_path):
    probes.write(tmp_path, steps=(0,))
    path = probe.step_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    content[content.index(b"weight.npy") + 200] ^= 1
    path.write_bytes(content)
    arrays = read(tmp_path).at(0)
    assert arrays["kept"].any()
    with pytest.raises(UserError, match="step-00000000.npz cannot be read: it is torn or damaged"):
        arrays["weight"]


def test_another_format_is_reported_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "FORMAT", 7)
    probes.write(tmp_path, steps=(0, 10))
    monkeypatch.undo()
    with pytest.raises(UserError, match="tokens.npz has format 7, but this version reads 1"):
        Probe.read(tmp_path)
    probe.save_tokens(tmp_path, probes.tokens())
    found = read(tmp_path)
    assert found.steps == [] and len(found.problems) == 2
    assert "step-00000000.npz has format 7" in found.problems[0]


def test_steps_without_tokens_are_an_error(tmp_path):
    probes.write(tmp_path)
    (probe.folder(tmp_path) / "tokens.npz").unlink()
    with pytest.raises(UserError, match="tokens.npz does not exist"):
        Probe.read(tmp_path)


def test_arrays_that_do_not_fit_the_table_are_not_written(tmp_path):
    tokens = probes.tokens()
    step = probes.step(0, tokens["valid"])
    with pytest.raises(ValueError, match="weight has shape .* its axes MNLK"):
        probes.save_step(tmp_path, 0, {**step, "weight": step["weight"][:, :, :-1]})
    with pytest.raises(ValueError, match="nats has shape"):
        probes.save_step(tmp_path, 0, {**step, "nats": step["nats"][0]})
    with pytest.raises(ValueError, match=r"collapse has shape \(\)"):  # one number for all layers
        probes.save_step(tmp_path, 0, {**step, "collapse": 0.5})
    del tokens["row"]
    with pytest.raises(ValueError, match="tokens.npz holds"):
        probe.save_tokens(tmp_path, tokens)
    assert not probe.folder(tmp_path).exists()
