"""The doctor reports working parts, missing parts and wrong results."""

import jax
import pytest

from moejax import cli
from moejax.cli import machine


@pytest.mark.slow
def test_doctor_tests_every_collective_and_a_layer(
    eight_devices: list[jax.Device],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    assert cli.main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in machine.COLLECTIVES:
        assert lines[name].split()[1] == "ok"
    assert "not on this backend" in lines["ragged_all_to_all"]  # XLA:CPU, jax issue 34755
    assert "8 x cpu" in lines["devices"]
    assert "ok, compiled" in lines["MoE"]
    assert "can train here" in lines["moejax"]


def test_doctor_reports_a_wrong_result(
    eight_devices: list[jax.Device],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    monkeypatch.setattr(machine, "moe_layer", lambda mesh: "ok")
    monkeypatch.setattr(jax.lax, "psum_scatter", lambda x, axis, tiled: x[:1])
    assert cli.main(["doctor"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out
