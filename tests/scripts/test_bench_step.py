"""The benchmark of the step compares what it claims to. No test depends on speed."""

import itertools
import json
import sys

import pytest

from scripts.layer_bench import step_table
from tests.scripts.test_gate_scripts import ROOT, script


@pytest.fixture(scope="module")
def bench(eight_devices):
    yield script("bench_step")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def against_plain(bench):
    return bench.ours_over_plain("debug", pairs=1)


@pytest.mark.slow
def test_our_dense_step_and_the_plain_one_give_the_same_losses(against_plain):
    """Otherwise it would have ended; three updates have moved the loss from ln(257) = 5.55."""
    assert against_plain["loss"] < 5.4 and against_plain["ratio"]["median"] > 0


@pytest.mark.slow
def test_steps_with_different_losses_are_not_compared(bench, monkeypatch):
    ffn = bench.plain_lm.ffn
    monkeypatch.setattr(bench.plain_lm, "ffn", lambda layer, x: 1.001 * ffn(layer, x))
    with pytest.raises(SystemExit, match="our loss is"):
        bench.ours_over_plain("debug", pairs=1)


@pytest.mark.slow
def test_moe_and_dense_are_compared_at_equal_active_flops(bench):
    row = bench.moe_over_dense("debug", "cells", 2, pairs=1)
    # Equal but for the router: 2 * 3 * D * E of 12.7 kFLOP a token and layer at this width.
    assert 1.0 < row["flops_ratio"] < 1.1
    assert row["what"] == "debug, cells, 2 devices" and row["ms"] > 0


@pytest.mark.slow
def test_the_loop_is_run_around_a_step_that_does_nothing(bench):
    own = bench.setup.Run.train_step
    row = bench.host_ms("debug", steps=12)
    assert bench.setup.Run.train_step is own
    assert row["value"]["low"] > 0 and row["call"]["median"] > 0


def test_pairs_alternate_and_the_ratio_is_first_over_second(bench, monkeypatch):
    order, clock = [], itertools.count()
    seconds = {"a": 3.0, "b": 2.0}
    now = [0.0]

    def taking(name):
        def run():
            order.append(name)
            now[0] += seconds[name]

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.time, "process_time", lambda: 2 * now[0] + 0 * next(clock))
    row = bench.paired(taking("a"), taking("b"), pairs=4)
    assert "".join(order) == "ab" + "abba" * 2
    assert row["ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5} == row["cpu_ratio"]
    assert (row["ms"], row["other_ms"]) == (3000, 2000)


@pytest.mark.slow
def test_every_row_has_a_target_and_a_line(bench, against_plain):
    lines = bench.table([against_plain]).splitlines()
    assert len(lines) == 2 and "ours_over_plain" in lines[1] and "<= 1.05" in lines[1]


def test_a_start_is_timed_up_to_its_first_step(bench, tmp_path, monkeypatch):
    """A stand-in process: the timing ends with the line, and the process gets SIGTERM."""
    stand_in = tmp_path / "moejax"
    stand_in.mkdir()
    (stand_in / "__main__.py").write_text(
        "import json, os, pathlib, signal, sys, time\n"
        "out = pathlib.Path(sys.argv[-1].removeprefix('--workdir=')).with_suffix('.json')\n"
        "def stop(*_):\n    out.write_text(json.dumps(dict(os.environ)))\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('compiling the training step ...', flush=True)\n"
        "print('compiled, first step done after 0 s', flush=True)\n"
        "time.sleep(60)\n"
    )
    module = sys.modules["first_step"]
    monkeypatch.setattr(module, "ROOT", tmp_path)
    seconds, cpu = module._start("debug", tmp_path, 0, ())
    environment = json.loads((tmp_path / "run0.json").read_text())
    assert environment["XDG_CACHE_HOME"] == f"{tmp_path}/cache" and 0 < seconds and 0 <= cpu
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "true"


def test_the_page_shows_the_rows_and_names_the_missed_targets():
    spread = {"median": 0.8, "low": 0.7, "high": 0.9}
    result = {
        "machine": {"cpu": "x", "cores": 2, "jax": "0", "load": [0.5, 1, 1]},
        "rows": [
            {"row": "moe_over_dense", "what": "tiny, cells", "ratio": spread, "cpu_ratio": spread},
            {"row": "host_ms", "what": "tiny", "value": spread, "cpu_mean": 1.5},
            {"row": "first_step cold", "what": "tiny", "value": {**spread, "median": 21.0}},
        ],
    }
    page = step_table.render(result)
    assert (
        "| `moe_over_dense` | tiny, cells | 0.80 [0.70, 0.90] | 0.80 [0.70, 0.90] | >= 0.85 |"
        in page
    )
    assert "| `host_ms` | tiny | 0.80 [0.70, 0.90] ms | 1.50 ms | <= 2 |" in page
    missed = step_table.shortfalls(result)
    assert [line.split(",")[0] for line in missed] == ["`moe_over_dense`", "`first_step cold`"]
