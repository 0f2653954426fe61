"""The scripts about gates: the documented table is current, the benchmark measures its claims."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_gates_is_current():
    page = script("make_gates_docs")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "docs/gates.md: run python scripts/make_gates_docs.py"


@pytest.mark.slow
def test_the_benchmark_times_all_solvers_on_the_same_scores(tmp_path, capsys):
    bench = script("bench_gates")
    out, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    bench.main(["--quick", "--repeats=1", f"--out={out}", f"--plot={picture}"])
    rows = json.loads(out.read_text())["rows"]
    assert {row["kind"] for row in rows} == set(bench.KINDS)
    by_kind = {kind: {r["impl"]: r for r in rows if r["kind"] == kind} for kind in bench.KINDS}
    for impls in by_kind.values():
        ours, scipy = impls["moejax"], impls["scipy"]
        assert ours["imbalance"] == scipy["imbalance"] == 0
        assert abs(ours["gap"]) < 1e-6 and scipy["gap"] == 0  # float32 scores
        assert impls["auction"]["gap"] is None or impls["auction"]["gap"] >= -1e-6
        assert all(row["seconds"] > 0 and row["over_moejax"] > 0 for row in impls.values())
    assert by_kind["constant"]["sinkhorn eps=1 x50"]["imbalance"] == 3.0, "all tokens tie"
    assert picture.stat().st_size > 10_000 and "imbalance" in capsys.readouterr().out


def test_the_reference_auction_balances_and_comes_near_the_optimum():
    bench = script("bench_gates")
    scores = bench.make_scores("normal", 96, 8)
    solved, best = bench.by_auction(scores), bench.by_scipy(scores)
    assert (np.bincount(solved.expert_T) == 12).all() and 0 < solved.rounds < 100
    total = lambda expert: scores[np.arange(96), expert].sum()
    # Its epsilon is a fiftieth of the range; each token is within about that of its best offer.
    assert 0 <= total(best.expert_T) - total(solved.expert_T) <= 96 * np.ptp(scores) / 50


@pytest.mark.parametrize("shape", ["64", "64xx4"])
def test_an_invalid_shape_is_an_error(shape, tmp_path):
    with pytest.raises(SystemExit) as caught:
        script("bench_gates").main([f"--out={tmp_path / 'x'}", f"--shapes={shape}"])
    assert caught.value.code == 2
