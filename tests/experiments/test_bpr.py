"""The experiment on batch-prioritised routing: its table, and a run of it."""

import json

import pytest

from experiments.bpr import run
from experiments.bpr.run import Arm
from tests.train.runs import ROOT


def rows(*accuracies: float) -> dict[int, dict[str, float]]:
    return {
        seed: {"accuracy": x, "loss": 1.0, "dropped": 0.25, "unserved": 0.0}
        for seed, x in enumerate(accuracies)
    }


def test_gains_compare_equal_seeds_with_an_interval():
    found = {Arm("position", 0.5): rows(0.5, 0.7), Arm("gate", 0.5): rows(0.6, 0.9)}
    # Differences 10 and 20 points: mean 15, t(1) s / sqrt(2) = 12.706 * 7.071 / 1.414.
    assert run.gain(found, Arm("gate", 0.5), "position", "accuracy") == "+15.0 ± 63.5"
    lines = run.table(found).splitlines()
    assert len(lines) == 4 and lines[2].endswith("| +15.0 ± 63.5 | +0.000 ± 0.000 |")
    assert "| 0.5 | gate | 75.0 ± 190.6 | 1.000 ± 0.000 | 25.0 ± 0.0 |" in lines[3]


def test_mistakes_are_reported_in_one_line(tmp_path, capsys):
    assert run.main([f"--out={tmp_path / 'x.json'}", "--seeds=0"]) == 2
    assert capsys.readouterr().err == "error: --seeds=0 must be at least 1\n"


@pytest.mark.slow
def test_the_experiment_runs_and_drops_nothing_without_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "bpr.json"
    assert run.main([f"--out={target}", "--seeds=1", "--steps=2"]) == 0
    arms = {
        (arm["priority"], arm["capacity"]): arm for arm in json.loads(target.read_text())["arms"]
    }
    dropped = {name: arm["seeds"]["0"]["dropped"] for name, arm in arms.items()}
    assert dropped["dropless", 0.0] == 0.0
    for priority in run.PRIORITIES:
        # A quarter of the slots holds at most a quarter of the pairs. Slots are counted for the
        # 360 images of 45 whole groups, of which the last one is padding.
        assert dropped[priority, 0.25] >= 1 - 0.25 * 360 / 359
        assert 0.75 > dropped[priority, 1.0] > 0.0
    assert capsys.readouterr().out.count("\n|") >= len(arms)
