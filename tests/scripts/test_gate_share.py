"""The benchmark of gates: its comparisons and its page. No test depends on speed."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moejax import gating
from scripts import bench_moe_layer, make_benchmark_docs
from scripts.layer_bench import gate_share, gate_table, timing
from scripts.layer_bench.problems import SHAPES, make_problem

TINY = SHAPES["tiny"]
TIMED = ("gshard", "dense", "dselect_k (decided)")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Three gates: each compiles four programs, and the others are called below."""
    out = tmp_path_factory.mktemp("gates") / "bench.json"
    some = [v for v in gate_share.variants(TINY) if v.label in TIMED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_share, "variants", lambda shape: some)
        bench_moe_layer.main(["--out", str(out), "--quick", "--parts", "gates"])
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_row_has_ratios_and_its_target(trial):
    assert {row["impl"] for row in trial["rows"]} == set(TIMED)
    for row in trial["rows"]:
        assert row["fwd_ratio"] > 0 and row["fwdbwd_ratio"] > 0 and row["experts_fwdbwd_ms"] > 0
        assert row["target"] == 0.15 and row["met"] == (row["fwdbwd_ratio"] <= 0.15)
    assert gate_table.target("base") == gate_table.target("sbase") == 0.25


def test_every_gate_is_timed_at_the_k_of_the_shape_and_at_its_own_if_that_is_1():
    found = {(v.name, v.fields.get("k")) for v in gate_share.variants(TINY._replace(k=4))}
    assert {name for name, _ in found} == set(gating.names())
    assert {k for name, k in found if name in ("switch", "sbase")} == {1, 4}
    assert {k for name, k in found if name in ("top_k", "mixtral", "shazeer", "dselect_k")} == {4}
    assert {k for name, k in found if name in ("base", "dense", "gshard")} == {None}


@pytest.mark.slow
def test_experts_receive_as_many_pairs_as_the_gate_routes(trial):
    pairs = {row["impl"]: row["pairs_per_token"] for row in trial["rows"]}
    assert pairs["dense"] == TINY.E
    assert 1 < pairs["dselect_k (decided)"] <= 2  # fewer where two selectors agree
    assert 1 < pairs["gshard"] < 2  # the second expert is skipped at times


@pytest.mark.slow
def test_the_page_lists_the_gates_and_the_missed_targets(trial):
    page = make_benchmark_docs.render([trial])
    assert "## Gates" in page and "| tiny | `dselect_k` (decided) | 2 |" in page
    row = {**trial["rows"][0], "met": False, "shape": "Z"}
    other = {**trial, "rows": [row], "settings": {**trial["settings"], "date": "1999-09-09"}}
    layers = {**trial, "rows": []}
    page = make_benchmark_docs.render([layers, other])
    assert "1999-09-09" in page, "a run of its own has a date of its own"
    assert f"Gate `{row['impl']}`, Z: " in page and "of its experts' time" in page


@pytest.mark.slow
def test_equal_experts_are_timed_in_part_and_scaled_up(monkeypatch):
    loads = np.full(8, 64)
    np.testing.assert_array_equal(gate_share.timed_part(loads, 512), loads)
    np.testing.assert_array_equal(gate_share.timed_part(loads, 511), loads[:7])
    np.testing.assert_array_equal(gate_share.timed_part(loads, 3), loads[:1])

    found = {"gate": timing.Timing(0.4, 0.2, 0.8, 10.0)}
    monkeypatch.setattr(timing, "paired", lambda base, candidates, rounds: (found, 25.0))
    monkeypatch.setattr(gate_share, "variants", lambda shape: [gate_share.Variant("dense", {})])
    (row,) = gate_share.rows(TINY._replace(k=1), rounds=1)
    assert row["experts_timed"] == 2  # of 8 on all tokens
    assert row["fwdbwd_ratio"] == 0.1 and row["fwdbwd_spread"] == [0.05, 0.2]
    assert row["experts_fwdbwd_ms"] == 100 and row["fwdbwd_ms"] == 10


def test_a_gate_that_does_not_fit_the_shape_gets_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(gate_share, "variants", lambda shape: [gate_share.Variant("replay", {})])
    (row,) = gate_share.rows(TINY, rounds=1)
    assert "gate.path=''" in row["not_run"] and "met" not in row
    page = gate_table.render([row])
    assert "Not run: `replay` at tiny, gate.path=''" in page
    assert not gate_table.shortfalls([row])


LEARNED = (
    "base", "dense", "dselect_k", "gshard", "mixtral", "sbase", "shazeer", "soft", "switch",
    "top_k",
)  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_by_parameters_and_tokens_are_timed(name):
    variant = next(v for v in gate_share.variants(TINY) if v.name == name and v.scale == 1.0)
    call = gate_share.GateCall(variant, TINY, make_problem(TINY))
    d_params, d_x = call.gradients
    assert d_x.shape == (8, 8, TINY.D)
    assert (np.abs(d_x).max() > 0) == (name != "shazeer"), "its matrices start at zero"
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(d_params))
    pairs = gate_share.loads(call.output, TINY.E).sum() / TINY.T
    slots = TINY.E / TINY.group  # one of every expert for a group
    visits = {"base": 1, "dense": TINY.E, "dselect_k": TINY.E, "soft": slots}  # fresh codes: all
    if name != "gshard":
        assert pairs == visits.get(name, variant.fields.get("k"))


def test_a_gate_that_does_not_do_its_work_is_detected():
    variant = gate_share.Variant("base", {})
    call = gate_share.GateCall(variant, TINY, make_problem(TINY))
    gate_share.check(call, variant, TINY)
    routing = call.output.routing
    for field, value, message in (
        ("expert_GTK", np.zeros_like(routing.expert_GTK), "not balanced"),
        ("weight_GTK", np.zeros_like(routing.weight_GTK), "visits no expert"),
        ("weight_GTK", np.full_like(routing.weight_GTK, np.nan), "not every number is finite"),
    ):
        broken = dataclasses.replace(routing, **{field: value})
        call.output = dataclasses.replace(call.output, routing=broken)
        with pytest.raises(ArithmeticError, match=message):
            gate_share.check(call, variant, TINY)
