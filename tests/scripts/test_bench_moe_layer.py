"""The benchmark of the layer: its arithmetic, checks and page. No test depends on speed."""

import json

import jax
import numpy as np
import pytest

from scripts import bench_moe_layer, make_benchmark_docs
from scripts.layer_bench import checks, layers, memory, shapes_run, timing, traffic
from scripts.layer_bench.problems import SHAPES, make_problem

TINY = SHAPES["tiny"]


def test_a_ratio_is_over_the_mean_of_the_two_runs_around_it(monkeypatch):
    clock = iter([9, 9, 10, 30, 20, 45, 10])  # warm-up of both, then base, run, base, run, base
    monkeypatch.setattr(timing, "seconds", lambda run: float(next(clock)))
    found, base_ms = timing.paired(lambda: 0, {"a": lambda: 0}, rounds=2)
    ratios = [30 / 15, 45 / 15]
    assert found["a"].ratio == np.median(ratios) and base_ms == 10_000
    assert (found["a"].low, found["a"].high) == tuple(np.quantile(ratios, [0.25, 0.75]))


def test_slow_candidates_run_in_fewer_rounds(monkeypatch):
    runs = []
    monkeypatch.setattr(timing, "seconds", lambda run: run())
    timing.paired(lambda: 1.0, {"slow": lambda: runs.append("slow") or 4.0,
                                "fast": lambda: runs.append("fast") or 1.0}, rounds=7)  # fmt: skip
    assert runs.count("slow") == 1 + timing.FEW and runs.count("fast") == 1 + 7


def test_ratios_are_over_the_faster_form_of_the_dense_ffn():
    found = {"3d": timing.Timing(0.5, 0.4, 0.6, 1.0), "ours": timing.Timing(2.0, 1.0, 3.0, 4.0)}
    assert timing.over_fastest(found, "3d")["ours"] == timing.Timing(4.0, 2.0, 6.0, 4.0)
    slower = {**found, "3d": timing.Timing(1.5, 1.4, 1.6, 3.0)}
    assert timing.over_fastest(slower, "3d")["ours"] == found["ours"]


@pytest.mark.slow
@pytest.mark.quick(1)
@pytest.mark.parametrize("name", layers.IMPLS)
def test_every_layer_of_the_table_equals_the_oracle_in_float64(name):
    assert 0 < checks.check(layers.IMPLS[name], TINY, tokens=0) <= checks.LIMIT


def test_capacity_drops_pairs_in_the_check_and_skewed_loads_are_skewed():
    even, skewed = (make_problem(TINY, zipf=zipf) for zipf in (False, True))
    experts = [layers.route(p.x_TD, p.params["router_DE"], TINY.k)[0] for p in (even, skewed)]
    kept = layers.kept_pairs(experts[0], TINY, 1.0)
    assert 0.2 < kept.mean() < 1
    assert layers.kept_pairs(experts[0], TINY, None).all()
    loads = [np.bincount(np.ravel(e), minlength=TINY.E) for e in experts]
    assert loads[1].max() > loads[0].max()


@pytest.mark.quick(1)
@pytest.mark.parametrize("defect", ["a token less", "weights swapped", "no gradient to the router"])
def test_a_layer_that_does_less_work_is_detected(defect):
    def build(shape):
        right = layers.IMPLS["sort-ragged_dot"].build(shape)

        def wrong(x_TD, params):
            if defect == "a token less":
                return right(x_TD, params).at[5].set(0.0)
            if defect == "weights swapped":
                return right(x_TD, {**params, "gate_EDF": params["up_EDF"]})
            router_DE = jax.lax.stop_gradient(params["router_DE"])
            return right(x_TD, {**params, "router_DE": router_DE})

        return wrong

    with pytest.raises(ArithmeticError, match="shape tiny: outputs or gradients are off by"):
        checks.check(layers.Impl(build), TINY, tokens=0)


def test_the_check_takes_whole_groups():
    assert checks.shrunk(SHAPES["B"], 1024).T == 1024
    assert checks.shrunk(SHAPES["B"], 700).T == 512
    assert checks.shrunk(SHAPES["B"], 0) == SHAPES["B"]
    assert checks.shrunk(SHAPES["A"], 9999) == SHAPES["A"]


def test_the_floor_of_kept_floats_counts_the_dense_ffn_with_packed_rows():
    """The dense FFN keeps its input, gate and up, and what its activation's derivative needs."""
    problem = make_problem(TINY)
    kept = memory.saved_per_token(layers.dense_2d, problem._replace(params=problem.dense)) / 4
    hidden = TINY.k * TINY.F
    assert TINY.D + 2 * hidden <= kept <= TINY.D + 6 * hidden
    assert memory.saved_floor(TINY) / 4 == TINY.k * TINY.D + 2 * hidden + TINY.D


def test_bytes_of_all_to_alls_are_read_from_a_program():
    text = """
      %a = f32[8,16,4]{2,1,0} all-to-all(%p), channel_id=1
      %b = (f32[2,3]{1,0}, f32[2,3]{1,0}) all-to-all-start(%q, %r)
      %c = f32[100]{0} all-reduce(%s)
      %d = s32[8]{0} all-to-all(%t)
    """
    assert traffic.all_to_all_floats(text) == 8 * 16 * 4 + 2 * 6


def test_traffic_at_capacity_one_is_k_copies_per_remote_token(eight_devices):
    del eight_devices
    rows = {row["impl"]: row for row in traffic.rows(["tiny"])}
    assert rows["cells-1.0"]["bytes_over_minimum"] == 1.0 and rows["cells-1.0"]["dropped"] > 0
    assert rows["cells-1.25"]["bytes_over_minimum"] == 1.5  # 3 slots for a mean of 2 pairs
    assert rows["dropless"]["bytes_over_minimum"] == 1.0 and rows["dropless"]["dropped"] == 0
    # One expert per device: as many rows, each with 2 k floats of routing beside its 8.
    assert rows["dropless_once"]["bytes_over_minimum"] == (8 + 2 * TINY.k) / 8


@pytest.mark.slow
def test_a_trial_run_writes_rows_and_the_page_shows_them(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    names = "dropless,cells-1.0,hf-mixtral-eager"
    monkeypatch.setattr(shapes_run.torch_layers, "missing", lambda: "torch is not installed")
    bench_moe_layer.main(["--out", str(out), "--quick", "--impls", names, "--parts", "layer"])
    result = json.loads(out.read_text())
    rows = {row["impl"]: row for row in result["rows"]}
    assert set(rows) == {"dense", "dense-3d", *names.split(",")}
    assert rows["hf-mixtral-eager"]["not_run"] == "torch is not installed"
    for field in ("fwd_ratio", "fwdbwd_ratio", "temp_bytes", "saved_bytes_per_token"):
        assert rows["dropless"][field] > 0
    assert rows["dropless"]["max_error"] <= checks.LIMIT
    assert "hostname" not in result["machine"]
    assert "dropless" in capsys.readouterr().out

    page = make_benchmark_docs.render([result])
    assert "## Shape tiny" in page and "not run | torch is not installed" in page
    assert result["versions"]["jax"] in page


def test_a_layer_that_needs_too_much_memory_gets_a_row_with_the_reason():
    rows = shapes_run.rows(TINY, ["sort-ragged_dot"], rounds=1, limit_gb=0.0, check_tokens=0)
    row = next(rows)
    assert row["impl"] == "sort-ragged_dot" and row["not_run"].startswith("needs 0.0 GB")


def test_missed_targets_are_listed_and_met_ones_are_not():
    def row(impl, fwdbwd):
        timed = {"fwd_ratio": 0.9, "fwd_spread": [0.9, 0.9], "fwdbwd_spread": [1.0, 1.4]}
        return {"kind": "layer", "shape": "A", "impl": impl, "fwdbwd_ratio": fwdbwd, **timed}

    layer = [row("dropless", 1.0), row("dropless-zipf", 1.3), row("cells-1.0", 1.2)]
    kinds = {"gates": [], "experts": [], "tokens": [], "traffic": [], "layer": layer}
    zipf, cells = sorted(make_benchmark_docs.shortfalls(kinds))
    assert "1.30 times" in zipf and "`cells-1.0`, A, forward+backward: 1.20" in cells


@pytest.mark.parametrize("flag", ["--shapes", "--impls", "--parts"])
def test_an_unknown_name_is_reported_in_one_line_and_nothing_is_written(flag, tmp_path, capsys):
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stopped:
        bench_moe_layer.main(["--out", str(out), flag, "nonsense"])
    assert stopped.value.code == 2 and not out.exists()
    assert "nonsense" in capsys.readouterr().err
