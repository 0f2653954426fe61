"""The GPU benchmark on tiny shapes: it checks before it times, and reports what it cannot run."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import bench_gpu, make_benchmark_docs
from scripts.layer_bench import gpu_layers, gpu_products, gpu_table, layers
from scripts.layer_bench.problems import GPU_SHAPES, SHAPES

pytestmark = pytest.mark.slow
TINY = SHAPES["tiny"]
LAYER_RESULT = {
    "machine": {"cpu": "some CPU", "cores": 2, "load_at_start": 0.0},
    "versions": {"jax": "0"},
    "settings": {"date": "2026-01-01", "rounds": 1, "check_tokens": 1, "limit_gb": 1.0},
    "rows": [],
}


def run(tmp_path, *options):
    out = tmp_path / "gpu.json"
    bench_gpu.main(["--out", str(out), "--rounds=1", *options])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """All that runs without a GPU and without tokamax."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tokamax", None)
        return run(tmp_path_factory.mktemp("gpu"), "--tiny", "--check-tokens=0")


def by_name(rows, kind):
    return {row["impl"]: row for row in rows if row["kind"] == kind}


def test_every_product_that_can_run_is_checked_and_timed(trial):
    rows = by_name(trial["rows"], gpu_products.KIND)
    assert set(rows) == {"dense", *gpu_products.CANDIDATES}
    for name in ("lax.ragged_dot", "cells-1.25", "cells-1.0"):
        assert 0 < rows[name]["max_error"] <= rows[name]["limit"] == 2**-8
        assert rows[name]["fwd_ratio"] > 0 and rows[name]["fwdbwd_ratio"] > 0
        low, high = rows[name]["fwdbwd_spread"]
        assert low <= rows[name]["fwdbwd_ratio"] <= high
    assert rows["cells-1.0"]["drops"] and not rows["lax.ragged_dot"]["drops"]
    for name in ("tokamax-triton", "tokamax-mosaic_gpu"):
        assert rows[name]["not_run"] == "tokamax is not installed"


def test_layers_are_checked_and_timed_in_bfloat16(trial):
    rows = by_name(trial["rows"], gpu_layers.KIND)
    assert set(rows) == {"dense", "dropless", "cells-1.25", "cells-1.0"}
    for name in gpu_layers.NAMES:
        # In float32 the error would be a thousandth of this.
        assert 2**-12 < rows[name]["max_error"] <= rows[name]["limit"] == 2**-6
        assert rows[name]["fwdbwd_ratio"] > 0
    assert trial["settings"]["dtype"] == "bfloat16"


def test_without_a_gpu_no_row_is_measured_and_each_states_the_reason(tmp_path, capsys):
    result = run(tmp_path)
    shapes = {row["shape"] for row in result["rows"]}
    assert shapes == set(GPU_SHAPES)
    for row in result["rows"]:
        assert row["not_run"] == "no CUDA GPU here, JAX runs on cpu"
    per_shape = len(gpu_products.CANDIDATES) + len(gpu_layers.NAMES)
    assert len(result["rows"]) == per_shape * len(shapes)
    text = capsys.readouterr().out
    assert text.count("not measured: no CUDA GPU") == len(result["rows"])
    assert "mixtral, layer: no choice, nothing was measured." in text
    page = make_benchmark_docs.render([LAYER_RESULT, result])
    assert "## GPU" in page and "not measured: no CUDA GPU here" in page
    assert "Not measured: this page was made without" in make_benchmark_docs.render([LAYER_RESULT])


def test_tokamax_kernels_are_called_and_differentiated(monkeypatch):
    """tokamax replaced by `jax.lax.ragged_dot_general`, as in tests/kernels."""
    calls = []

    def ragged_dot_general(lhs, rhs, group_sizes, *, implementation, **options):
        calls.append(implementation)
        if implementation == "mosaic_gpu":
            raise NotImplementedError("needs a Hopper")
        return jax.lax.ragged_dot_general(lhs, rhs, group_sizes, **options)

    stand_in = types.SimpleNamespace(ragged_dot_general=ragged_dot_general)
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    rows = {row["impl"]: row for row in gpu_products.rows(TINY, rounds=1)}
    assert 0 < rows["tokamax-triton"]["max_error"] <= 2**-8
    assert calls.count("triton") == 1 + 3  # forward; forward, dx and dw
    assert "needs a Hopper" in rows["tokamax-mosaic_gpu"]["not_run"]


def wrong_product(defect):
    def product(x_ND, w_EDF, sizes_E):
        if defect == "a row at the next expert":
            sizes_E = sizes_E.at[0].add(1).at[1].add(-1)
        if defect == "no gradient of the matrices":
            w_EDF = jax.lax.stop_gradient(w_EDF)
        y_NF = jax.lax.ragged_dot(x_ND, w_EDF, sizes_E)
        return y_NF.at[3].set(jnp.nan) if defect == "NaN" else y_NF

    return product


@pytest.mark.parametrize(
    "defect", ["a row at the next expert", "no gradient of the matrices", "NaN"]
)
def test_a_wrong_product_is_not_timed_and_the_script_fails(defect, tmp_path, monkeypatch, capsys):
    candidates = {
        "wrong": gpu_products.Candidate(wrong_product(defect)),
        "right": gpu_products.Candidate(wrong_product("")),
    }
    monkeypatch.setattr(gpu_products, "CANDIDATES", candidates)
    monkeypatch.setattr(gpu_layers, "NAMES", ())
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--tiny")
    assert stopped.value.code == 1
    rows = by_name(json.loads((tmp_path / "gpu.json").read_text())["rows"], gpu_products.KIND)
    assert rows["wrong"]["not_run"].startswith("wrong: off by")
    assert "fwd_ratio" not in rows["wrong"] and "fwd_ratio" in rows["right"]
    assert "* tiny, product: `right`" in capsys.readouterr().out


def test_a_wrong_layer_is_detected():
    right = layers.IMPLS["dropless"].build

    def build(shape):
        layer = right(shape)
        return lambda x_TD, params: layer(x_TD, params).at[5].set(0.0)

    assert gpu_layers.error_of(right, None, TINY) <= gpu_layers.LIMIT
    assert gpu_layers.error_of(build, None, TINY) > gpu_layers.LIMIT


def test_the_error_is_the_largest_difference_over_the_largest_entry():
    given = gpu_products.operands(TINY, None)
    x, w, dy = (np.asarray(a, np.float64) for a in (given.x_ND, given.w_EDF, given.dy_NF))
    expert_N = np.repeat(np.arange(TINY.E), given.sizes_E)
    assert len(expert_N) == TINY.T * TINY.k == len(x)
    y = np.einsum("nd,ndf->nf", x, w[expert_N])
    dx = np.einsum("nf,ndf->nd", dy, w[expert_N])
    dw = np.zeros(w.shape)
    np.add.at(dw, expert_N, x[:, :, None] * dy[:, None, :])
    assert gpu_products.largest_error((y, dx, dw), given) < 1e-12
    for i in range(3):
        got = [y.copy(), dx.copy(), dw.copy()]
        got[i][tuple(s - 1 for s in got[i].shape)] += 0.01 * np.abs(got[i]).max()
        np.testing.assert_allclose(gpu_products.largest_error(tuple(got), given), 0.01, rtol=1e-6)


def measured(impl, middle, spread=0.01, drops=False, kind=gpu_products.KIND):
    both = {"fwdbwd_ratio": middle, "fwdbwd_spread": [middle - spread, middle + spread]}
    return {"kind": kind, "shape": "s", "impl": impl, "drops": drops, **both}


def test_the_choice_names_the_fastest_and_its_margin():
    one = measured("one", 1.2)
    (line,) = gpu_table.choices([one])
    assert line == "* s, product: `one`, 1.20 [1.19, 1.21], the only one measured."
    (line,) = gpu_table.choices([one, measured("two", 1.5)])
    assert "`one`, 1.20 [1.19, 1.21], before `two`, 1.50 [1.49, 1.51]: quartiles apart." in line
    (line,) = gpu_table.choices([one, measured("two", 1.205)])
    assert "a tie" in line


def test_the_fastest_without_drops_is_named_too_if_the_fastest_drops_pairs():
    rows = [measured("cells", 1.0, drops=True), measured("kernel", 1.3), measured("slow", 9.0)]
    (line,) = gpu_table.choices(rows)
    assert "`cells`, 1.00" in line and "drop nothing: `kernel`, 1.30" in line
    (line,) = gpu_table.choices([*rows, measured("best", 0.9)])
    assert "`best`, 0.90" in line and "drop nothing" not in line


@pytest.mark.parametrize("options", [["--shapes=nonsense"], ["--out=missing/gpu.json"]])
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    options, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main(["--out=gpu.json", *options])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    assert len(capsys.readouterr().err.splitlines()) == 1
