"""Variants against a baseline: numbers by scipy, marks, verdicts, and the budget before a run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from scipy import stats

from moejax.errors import UserError
from moejax.sweep import budget, summary
from moejax.sweep.comparison import Summary, compare
from moejax.sweep.count import Counted
from moejax.sweep.definition import Sweep
from moejax.sweep.match import Comparison, Solved
from moejax.sweep.results import Result, write_csv
from moejax.sweep.seed_variance import read_pilot
from moejax.sweep.statistics import Difference, outcome, verdict
from tests.sweep.test_results import LEAK, result, sweep_of

LOSSES = {
    "top_2": (2.00, 2.04, 2.08),
    "close": (2.01, 2.03, 2.09),
    "better": (1.951, 1.990, 2.029),
    "worse": (2.103, 2.139, 2.178),
}


def sweep_with(losses: dict[str, Any] = LOSSES, **claims: Any) -> Sweep:
    trials = [(name, seed) for name, own in losses.items() for seed in range(len(own))]
    return dataclasses.replace(sweep_of(*trials), comparison=Comparison(**claims))


def results_of(losses: dict[str, Any] = LOSSES, **changes: Any) -> list[Result]:
    return [
        result(variant=name, seed=seed, loss=loss, **changes.get(name, {}))
        for name, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def compared(**changes: Any) -> Summary:
    sweep = sweep_with(match="active_flops", baseline="top_2")
    return compare(sweep, results_of(**changes), set())


def test_means_and_differences_equal_scipys():
    found = compared()
    p_values = {}
    for name, losses in LOSSES.items():
        own = found.of(name)
        low, high = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
        assert own.mean == pytest.approx(np.mean(losses)) and own.half_width is not None
        assert own.half_width == pytest.approx((high - low) / 2)
        if name == "top_2":
            assert own.difference is None and own.verdict == own.outcome == "baseline"
            continue
        test = stats.ttest_rel(losses, LOSSES["top_2"])
        assert own.difference is not None and own.difference.p == pytest.approx(test.pvalue)
        p_values[name] = test.pvalue
    ordered = sorted(p_values, key=p_values.__getitem__)
    holm = np.maximum.accumulate([p_values[name] * (3 - i) for i, name in enumerate(ordered)])
    for name, wanted in zip(ordered, np.minimum(holm, 1), strict=True):
        assert found.of(name).p_holm == pytest.approx(wanted)


def test_verdicts_are_sentences_with_numbers():
    found = compared()
    # Differences -0.049, -0.050, -0.051: mean -0.05, and t(2) 0.001 / sqrt(3) = 0.00248.
    assert found.of("better").verdict == "better by 0.050 ± 0.002 nats/byte"
    assert found.of("worse").outcome == "worse"
    assert found.of("close").verdict == "not distinguishable at 3 seeds"


def test_a_difference_that_is_insignificant_only_after_holms_correction_is_marked():
    seen = Difference((0, 1, 2), -0.25, 0.11, 0.04, 0.02)
    assert outcome(seen, 0.04) == "better" and outcome(seen, 0.2) == "better if alone"
    assert verdict(seen, 0.2, "nats/byte") == (
        "not distinguishable at 3 seeds among so many variants (alone better by 0.250 ± 0.110 "
        "nats/byte)"
    )
    assert outcome(dataclasses.replace(seen, mean=0.25), 0.2) == "worse if alone"
    assert outcome(dataclasses.replace(seen, p=0.07), 0.07) == "not distinguishable"


def test_a_single_or_no_common_seed_gives_no_verdict():
    sweep = sweep_of(("a", 0), ("b", 0), ("c", 1))
    sweep = dataclasses.replace(sweep, comparison=Comparison(baseline="a"))
    found = [result(variant=v, seed=s) for v, s in (("a", 0), ("b", 0), ("c", 1))]
    known = compare(sweep, found, set())
    assert known.of("b").verdict == "one seed: no verdict"
    assert known.of("c").verdict == "no seed in common with the baseline: no verdict"
    assert known.of("b").outcome == known.of("c").outcome == "no verdict"
    assert known.detectable is None
    nothing = compare(sweep, found[:1], set())
    assert nothing.of("b").verdict == "no finished seed: no verdict"
    assert nothing.of("b").marks == ("unfinished",)


def test_diverged_trials_are_named_and_left_out_of_means():
    found = [r for r in results_of() if (r.variant, r.seed) != ("better", 1)]
    sweep = sweep_with(baseline="top_2")
    own = compare(sweep, found, {("better", 1)}).of("better")
    assert own.mean == pytest.approx((1.951 + 2.029) / 2)
    assert (own.seeds, own.diverged, own.unfinished) == ((0, 2), (1,), ())
    assert own.marks == ("diverged",) and own.verdict.endswith("; 1 diverged (seed 1)")
    assert own.difference is not None and own.difference.seeds == (0, 2)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_counts_as_divergence(loss: float):
    found = [dataclasses.replace(r, loss=loss) if r.variant == "worse" else r for r in results_of()]
    known = compare(sweep_with(baseline="top_2"), found, set())
    worse = known.of("worse")
    assert (worse.seeds, worse.diverged, worse.mean) == ((), (0, 1, 2), None)
    assert worse.marks == ("diverged",) and worse.difference is None
    without = [r for r in found if r.variant != "worse"]
    assert known.detectable == compare(sweep_with(baseline="top_2"), without, set()).detectable
    json.dumps(summary.to_json(known), allow_nan=False)


@pytest.mark.parametrize(
    "match, field, unit",
    [
        ("active_flops", "train_flops_per_token", 1.2e6),
        ("total_params", "total_parameters", 1000),
        ("step_time", "seconds_per_step", 0.1),
    ],
)
@pytest.mark.parametrize(
    "share, missed", [(1.019, False), (0.981, False), (1.021, True), (0.979, True)]
)
def test_a_true_cost_2_percent_away_misses_the_match(
    match: str, field: str, unit: float, share: float, missed: bool
):
    found = results_of(close={field: unit * share}, worse={"leak": LEAK})
    known = compare(sweep_with(match=match, baseline="top_2"), found, set())
    close = known.of("close")
    assert close.cost == pytest.approx(unit * share) and close.cost_ratio == pytest.approx(share)
    assert close.missed_match == missed and ("cost" in close.marks) == missed
    assert all(point.missed_match == missed for point in close.trials)
    assert known.of("worse").marks == ("leak",)
    claimless = compare(sweep_with(baseline="top_2"), found, set())
    assert not any(v.missed_match for v in claimless.variants), "no match was claimed"


def test_a_variant_is_marked_if_any_trial_misses_the_match():
    found = results_of()
    found[4] = dataclasses.replace(found[4], train_flops_per_token=1.25e6)
    own = compare(sweep_with(match="active_flops", baseline="top_2"), found, set()).of("close")
    assert [point.missed_match for point in own.trials] == [False, True, False]
    assert own.marks == ("cost",) and own.cost_ratio == pytest.approx((2 + 1.25 / 1.2) / 3)


def test_the_baseline_cannot_miss_the_match():
    """Its seeds may differ in cost: it claims nothing."""
    found = results_of()
    found[0] = dataclasses.replace(found[0], train_flops_per_token=1.5e6)
    own = compare(sweep_with(match="active_flops", baseline="top_2"), found, set()).of("top_2")
    assert own.trials[0].cost_ratio == pytest.approx(1.5 / 1.3)
    assert own.marks == () and not any(point.missed_match for point in own.trials)


def test_the_csv_and_the_json_hold_the_comparison(tmp_path: Path):
    sweep = sweep_with(match="active_flops", baseline="top_2")
    found = results_of(worse={"train_flops_per_token": 1.5e6, "leak": LEAK})[:-1]
    known = compare(sweep, found, {("worse", 2)})
    write_csv(tmp_path, sweep, found, summary.columns(known))
    rows = pandas.read_csv(tmp_path / "results.csv").set_index(["variant", "seed"])
    assert rows.finished.tolist() == [1] * 11 + [0]
    assert rows.diverged.tolist() == [0] * 11 + [1]
    paired = rows.loc["better"].difference
    assert paired.tolist() == pytest.approx([-0.049, -0.05, -0.051])
    assert rows.loc["better"].variant_difference.tolist() == pytest.approx([-0.05] * 3)
    assert rows.loc["worse"].cost_ratio.tolist()[:2] == pytest.approx([1.25, 1.25])
    assert rows.loc["worse"].missed_match.tolist()[:2] == [1, 1]
    assert set(rows.loc["worse"].variant_marks) == {"leak cost diverged"}
    assert rows.loc["top_2"].verdict.tolist() == ["baseline"] * 3

    tree = json.loads(json.dumps(summary.to_json(known), allow_nan=False))
    worse = tree["variants"][3]
    assert (worse["variant"], worse["seeds"], worse["diverged"]) == ("worse", [0, 1], [2])
    assert worse["difference"]["p_holm"] == known.of("worse").p_holm
    assert [trial["workdir"] for trial in worse["trials"]] == [
        f"trials/worse-seed{i}" for i in (0, 1)
    ]
    assert (tree["baseline"], tree["match"], tree["format"]) == ("top_2", "active_flops", 1)


def test_unmeasured_times_are_null_and_miss_no_match():
    found = results_of(close={"seconds_per_step": math.nan})
    known = compare(sweep_with(match="step_time", baseline="top_2"), found, set())
    assert known.of("close").cost is None and not known.of("close").missed_match
    json.dumps(summary.to_json(known), allow_nan=False)


# The budget.


def with_configs(sweep: Sweep, transport: str) -> Sweep:
    train = {"steps": 100, "batch_size": 8, "seq_len": 16}
    config = {"train": train, "moe": {"transport": transport}}
    trials = [dataclasses.replace(trial, config=config) for trial in sweep.trials]
    return dataclasses.replace(sweep, trials=tuple(trials))


def announced(
    monkeypatch: pytest.MonkeyPatch,
    sweep: Sweep,
    finished: list[Result],
    transport: str = "dropless",
    **how: Any,
) -> list[str]:
    monkeypatch.setattr(budget, "read_sweep", lambda *_: finished)
    monkeypatch.setattr(budget, "count", lambda configs: [Counted(9, 1e6, 16)] * len(configs))
    return budget.lines(with_configs(sweep, transport), Path("."), **how)


def test_the_budget_of_a_new_sweep(monkeypatch: pytest.MonkeyPatch):
    work, time, noise = announced(monkeypatch, sweep_with(baseline="top_2"), [])
    # 12 trials of 100 steps of 128 tokens of 1 MFLOP
    assert work.startswith("to run: 12 trials, 1200 steps, 153.6 k tokens, 153.6 GFLOP (counted")
    assert time == "time: unknown until a trial has finished"
    assert "without a pilot: run --filter='top_2-seed*' first, or set PILOT" in noise


def test_the_budget_covers_unfinished_trials(monkeypatch: pytest.MonkeyPatch):
    """By the variant's own trials where there are any: 20 s, of 150 steps of 0.1 s."""
    finished = [*results_of()[:3], result(variant="close", step=100, elapsed_seconds=50.0)]
    sweep = sweep_with(baseline="top_2", pilot=0.01)
    work, time, noise = announced(monkeypatch, sweep, finished)
    assert "8 trials, 800 steps" in work
    others = (3 * 15 + 50) / 4
    assert (
        f"about {(2 * 50 + 6 * others) / 60:.0f} min one after the other, judged by the 4" in time
    )
    assert noise.startswith("3 seeds detect a difference of ")
    chosen = with_configs(sweep, "dropless").trials[4:5]
    work, time, _ = announced(monkeypatch, sweep, finished, chosen=chosen)
    assert "1 trial, 100 steps" in work and "about 50 s" in time


@pytest.mark.parametrize(
    "match, transport, before",
    [
        ("active_flops", "dropless", ""),
        ("active_flops", "cells", " before drops"),
        ("total_params", "cells", ""),
    ],
)
def test_matched_widths_are_in_the_budget(
    match: str, transport: str, before: str, monkeypatch: pytest.MonkeyPatch
):
    sweep = sweep_with(match=match, baseline="top_2")
    sweep = dataclasses.replace(sweep, solved=(Solved("close", "moe.d_ff", 64, 0.998),))
    first, *_ = announced(monkeypatch, sweep, [], transport)
    assert first == f"matched to top_2's counted {match}{before}: close moe.d_ff=64 (0.998)"


def test_a_finished_sweep_has_no_work_and_one_seed_no_detectable_difference(
    monkeypatch: pytest.MonkeyPatch,
):
    one = {name: own[:1] for name, own in LOSSES.items()}
    sweep = sweep_with(one, baseline="top_2", pilot=0.01)
    (said,) = announced(monkeypatch, sweep, results_of(one))
    assert said == "one seed or one variant: there are no differences to test"


def test_a_pilot_gives_the_time_and_the_seed_variance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pilot = sweep_with()
    write_csv(tmp_path, pilot, results_of())
    assert [(p.variant, p.seed, p.loss) for p in read_pilot(str(tmp_path))] == [
        (name, seed, loss) for name, own in LOSSES.items() for seed, loss in enumerate(own)
    ]
    sweep = sweep_with(baseline="top_2", pilot=str(tmp_path))
    _, time, noise = announced(monkeypatch, sweep, [])
    assert (
        "judged by the 12 pilot's trials" in time
        and f"9 differences to top_2 in {tmp_path}" in noise
    )
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="results.csv was not written by this version"):
        read_pilot(str(tmp_path))
