"""Numbers to text and to a picture."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moejax.config import load, to_dict
from moejax.errors import UserError
from moejax.sweep import figure, results, table
from moejax.sweep.comparison import compare
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.match import Comparison
from moejax.sweep.results import (
    Result,
    elapsed_seconds,
    evaluated_bytes_per_token,
    kept_pairs,
    read_diverged,
    read_sweep,
    step_seconds,
)
from tests.train.runs import ROOT

PLAIN = Result(
    variant="switch",
    seed=0,
    id="x",
    step=150,
    loss=2.0,
    train_flops_per_token=1.2e6,
    eval_flops_per_token=0.4e6,
    train_pairs_per_token=0.75,
    eval_pairs_per_token=1.0,
    seconds_per_step=0.1,
    train_seconds=15.0,
    elapsed_seconds=20.0,
    train_max_vio=0.5,
    eval_max_vio=0.25,
    train_drop_rate=0.25,
    eval_drop_rate=0.0,
    total_parameters=1000,
    leak="",
)
LEAK = "train:future+others"


def result(**changes: Any) -> Result:
    return dataclasses.replace(PLAIN, **changes)


def sweep_of(*names: tuple[str, int]) -> Sweep:
    return Sweep("page.py", tuple(Trial(name, seed, (), {}) for name, seed in names))


# Step times.


def timings(*rows: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"step": s, "seconds_per_step": t, "elapsed": e} for s, t, e in rows]


def test_the_median_step_leaves_out_the_first_interval_after_each_start():
    rows = timings((10, 9.0, 90), (20, 1.0, 100), (30, 3.0, 130), (40, 8.0, 80), (50, 2.0, 100))
    assert step_seconds(rows) == (2.0, 10 * (9 + 1 + 3 + 8 + 2))


def test_one_slow_interval_moves_the_total_and_not_the_median():
    rows = timings((10, 9.0, 90), (20, 1.0, 100), (30, 1.5, 115), (40, 8.0, 195))
    assert step_seconds(rows) == (1.5, 10 * (9 + 1 + 1.5 + 8))


def test_an_interval_that_was_a_compilation_alone_counts_as_median_steps():
    rows = timings((1, math.nan, 0), (3, 2.0, 4), (6, 4.0, 16))
    assert step_seconds(rows) == (3.0, 1 * 3.0 + 2 * 2.0 + 3 * 4.0)


def test_a_single_interval_is_the_median_and_none_gives_nan():
    assert step_seconds(timings((8, 2.0, 16))) == (2.0, 16.0)
    assert all(map(math.isnan, step_seconds(timings((1, math.nan, 0)))))


def test_kept_pairs_are_those_not_dropped():
    row = {"moe/load": [[6, 2]], "moe/experts_per_token": 2.0, "moe/drop_rate": 0.25}
    assert kept_pairs(row) == 1.5 and kept_pairs({"loss": 1.0}) is None


def test_a_trials_numbers_are_means_over_its_steps_and_those_of_its_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows after steps 2 and 10 stand for two steps and for eight."""

    def row(step: int, split: str, violation: float, drops: float, **more: Any) -> str:
        known = {"moe/max_vio": violation, "moe/drop_rate": drops, "moe/experts_per_token": 2.0}
        said = {"step": step, "split": split, "leak": "", "moe/load": [[6, 2], [4, 4]], **known}
        return json.dumps(said | more)

    workdir = tmp_path / "trials/a-seed0"
    workdir.mkdir(parents=True)
    lines = [
        row(2, "train", 1.0, 0.5),
        row(5, "eval", 3.0, 0.9, loss=9.0),
        row(10, "train", 0.5, 0.25),
        row(10, "eval", 0.125, 0.0, loss=2.5),
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (workdir / "timings.jsonl").write_text("")
    flops = {"fixed": 100.0, "per_pair": 10.0}
    saved = {
        "flops": {"train": flops, "eval": flops},
        "parameters": {"total": 7},
        "units": {"loss": "nats/image"},
        "config": {"train": {"log_every": 8, "eval_every": 5, "steps": 10}},
    }
    monkeypatch.setattr(results, "read_config", lambda folder: saved)
    found = results.read_trial(tmp_path, Trial("a", 0, (), {}))
    assert (found.step, found.loss, found.unit) == (10, 2.5, "nats/image")
    assert found.train_max_vio == (2 * 1.0 + 8 * 0.5) / 10 and found.eval_max_vio == 0.125
    assert found.train_drop_rate == (2 * 0.5 + 8 * 0.25) / 10 and found.eval_drop_rate == 0.0
    assert found.train_pairs_per_token == (2 * 1.0 + 8 * 1.5) / 10
    # In each of two layers.
    assert found.train_flops_per_token == 100 + 10 * 2 * 1.4
    assert found.eval_flops_per_token == 100 + 10 * 2 * 2.0


def test_a_trial_of_another_version_is_refused_by_name(tmp_path: Path):
    config = to_dict(load(f"{ROOT}/configs/lm.py", ["train.steps=3"]).config)
    sweep = Sweep("page.py", (Trial("a", 0, (), config),))
    workdir = tmp_path / "trials/a-seed0"
    workdir.mkdir(parents=True)
    assert read_sweep(tmp_path, sweep) == []
    (workdir / "summary.png").touch()
    (workdir / "timings.jsonl").touch()
    (workdir / "metrics.jsonl").write_text('{"step": 3, "split": "eval", "loss": 2.0}\n')
    saved = {"config": config, "fingerprint": "", "baselines": {}, "heldout_bytes_per_token": 1.0}
    (workdir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="a-seed0 has no 'flops'"):
        read_sweep(tmp_path, sweep)


def test_a_loss_of_text_is_divided_by_the_bytes_of_its_own_targets(tmp_path: Path):
    per_token = evaluated_bytes_per_token
    saved = {"evaluated": {"rows": 2, "tokens": 32, "bytes": 120}, "heldout_bytes_per_token": 3.0}
    assert per_token(saved, tmp_path) == 120 / 32
    assert (
        per_token({"evaluated": {"rows": 2, "tokens": 32}}, tmp_path) is None
    )  # shards that do not say
    assert per_token({"heldout_bytes_per_token": 1.0}, tmp_path) == 1.0  # an older run on bytes
    assert per_token({"classes": ["a"]}, tmp_path) is None
    with pytest.raises(UserError, match="older version.*run the sweep again"):
        per_token({"heldout_bytes_per_token": 3.1}, tmp_path)


def test_elapsed_seconds_are_summed_over_all_starts():
    rows = timings((10, 9.0, 90), (20, 1.0, 100), (30, 3.0, 30), (40, 8.0, 80), (50, 2.0, 20))
    assert elapsed_seconds(rows) == 100 + 80 + 20 and elapsed_seconds([]) == 0


def test_a_start_that_took_longer_than_the_previous_one_counts_as_a_start():
    """The second row of the new start is past the last of the old one; so may be the first."""
    rows = timings((10, 1.0, 10), (20, 1.0, 20), (30, 9.0, 25), (40, 1.5, 30))
    starts = [row | {"from_step": start} for row, start in zip(rows, (0, 0, 20, 20), strict=True)]
    assert elapsed_seconds(starts) == 20 + 30
    assert step_seconds(starts) == (1.25, 10 * (1 + 1 + 9 + 1.5))
    # Begun by a version that did not write it.
    assert elapsed_seconds(rows[:2] + starts[2:]) == 20 + 30


def test_a_trial_has_diverged_if_its_last_attempt_did(tmp_path: Path):
    """Not an attempt before, and not one that somebody mentions."""
    said, again = "moejax: diverged at step 3: ...", "# 2026-01-01  moejax train"
    logs = {
        "now": f"{again}\nstep 1\n{said}\n",
        "before": f"{again}\n{said}\n{again}\nstep 1\n",
        "mentioned": f"{again}\nperhaps {said}\n",
    }
    for name, text in logs.items():
        (tmp_path / f"trials/{name}-seed0").mkdir(parents=True)
        (tmp_path / f"trials/{name}-seed0/log.txt").write_text(text)
    sweep = sweep_of(*((name, 0) for name in [*logs, "not_begun"]))
    assert read_diverged(tmp_path, sweep) == {("now", 0)}


# The table.


def rendered(sweep: Sweep, found: list[Result]) -> str:
    return table.render(found, compare(sweep, found, set()))


def test_an_interval_has_enough_decimals():
    plain = ("2.0000", "2.1235 ±0.0123", "-0.50000 ±0.00002")
    given = ((2.0, None, ""), (2.12346, 0.01234, ""), (-0.5, 2e-5, "+"))
    assert tuple(table.interval(*each) for each in given) == plain
    assert table.interval(None, None) == "-"


def test_variants_keep_their_order_and_show_their_seeds():
    sweep = sweep_of(("b", 0), ("b", 1), ("a", 0), ("c", 0))
    found = [result(variant="b"), result(variant="b", seed=1, loss=2.5), result(variant="c")]
    lines = rendered(sweep, found).splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["b", "2"], ["a", "0/1"], ["c", "1"]]
    assert "1.200" in lines[2] and "25.0" in lines[2] and "MFLOP" in lines[0]
    # 12.706 x 0.35355 / sqrt(2)
    assert "2.2500 ±3.1766" in lines[2]
    assert "difference" not in lines[0] and "verdict" not in lines[1], "there is no baseline"
    assert max(map(len, lines)) <= 100


def test_a_leak_is_in_the_table_and_explained():
    text = rendered(sweep_of(("base", 0), ("a", 0)), [result(variant="base", leak=LEAK)])
    lines = text.splitlines()
    assert lines[2].endswith(" leak") and lines[3].split()[0] == "a"
    assert f"leak: base ({LEAK}): what a token's output may depend on besides itself" in text


def test_a_comparison_fits_into_140_columns():
    found = [r for r in crowded(0) if r.variant != "dselect_k"]
    sweep = dataclasses.replace(
        sweep_of(*((r.variant, r.seed) for r in found)),
        comparison=Comparison("active_flops", "top_2"),
    )
    lines = rendered(sweep, found).splitlines()
    assert max(map(len, lines)) <= 140
    row = next(line for line in lines if line.startswith("switch"))
    assert row.endswith("cost") and "0.756" in row and " not distinguishable " in row
    assert next(line for line in lines if line.startswith("top_2")).endswith("baseline")


def test_units_make_the_largest_number_at_least_1():
    assert table.unit([2e3, 5e6]) == (1e6, "M") and table.unit([0.5]) == (1.0, "")
    assert table.unit([3e12]) == (1e12, "T") and table.unit([]) == (1.0, "")


# The picture.


def drawn_of(title: str, found: list[Result], **claims: Any) -> Any:
    trials = dict.fromkeys((r.variant, r.seed) for r in found)
    sweep = dataclasses.replace(sweep_of(*trials), comparison=Comparison(**claims))
    return figure.figure(title, found, compare(sweep, found, set()))


def crowded(seed: int, dselect_flops: float = 5.2e6) -> list[Result]:
    """Six variants at four costs, two seeds each; two of them leak."""
    rng = np.random.default_rng(seed)
    flops = {
        "dense_ffn": 1.77e6, "top_2": 1.6e6, "switch": 1.21e6,
        "base": 1.32e6, "sbase": 1.3e6, "dselect_k": dselect_flops,
    }  # fmt: skip
    found = []
    for name, cost in flops.items():
        level = rng.normal(2.0, 0.05)
        for number in range(2):
            found.append(
                result(
                    variant=name,
                    seed=number,
                    loss=level + rng.normal(0, 0.02),
                    train_flops_per_token=cost,
                    train_seconds=cost / 5e4 + rng.normal(0, 2),
                    leak=LEAK if "base" in name else "",
                )
            )
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(4))
def test_every_variant_is_named_outside_the_panels_and_every_point_is_inside(seed: int):
    found = crowded(seed)
    drawn = drawn_of("a title", found, match="active_flops", baseline="top_2")
    drawn.canvas.draw()
    renderer = drawn.canvas.get_renderer()
    names = ["dense_ffn ‡", "top_2", "switch ‡", "base †‡", "sbase †‡", "dselect_k ‡"]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    boxes = [text.get_window_extent(renderer) for text in legend.get_texts()]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    panels = drawn.axes[:2]
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in panels)
    for axes, value in zip(panels, ("train_flops_per_token", "train_seconds"), strict=True):
        scale = 1e6 if value == "train_flops_per_token" else 1
        points = axes.transData.transform([(getattr(r, value) / scale, r.loss) for r in found])
        inside = axes.get_window_extent(renderer)
        assert all(inside.contains(*point) for point in points)
    assert not legend.get_window_extent().overlaps(drawn.axes[2].get_tightbbox())


def points_of(axes: Any) -> list[tuple[float, float]]:
    from matplotlib.collections import PathCollection

    drawn: list[Any] = [c for c in axes.collections if isinstance(c, PathCollection)]
    return [tuple(p) for collection in drawn for p in collection.get_offsets()]


def test_points_are_the_results_and_leaks_are_marked_and_explained():
    found = crowded(0)
    drawn = drawn_of("page.py in runs/a", found)
    assert points_of(drawn.axes[0]) == [(r.train_flops_per_token / 1e6, r.loss) for r in found]
    assert points_of(drawn.axes[1]) == [(r.train_seconds, r.loss) for r in found]
    said = "\n".join(text.get_text() for text in drawn.texts)
    assert f"base, sbase: a token's output may depend on {LEAK}" in said
    assert "page.py in runs/a" in said and "MFLOP per token" in drawn.axes[0].get_xlabel()
    assert "\N{DOUBLE DAGGER}" not in said, "no match was claimed"


def test_a_missed_match_is_open_named_and_at_its_true_cost():
    found = [result(variant=v, train_flops_per_token=f) for v, f in (("a", 1e6), ("b", 1.03e6))]
    drawn = drawn_of("", found, match="active_flops", baseline="a")
    assert points_of(drawn.axes[0]) == [(1.0, 2.0), (1.03, 2.0)]
    from matplotlib.collections import PathCollection

    points: list[Any] = [c for c in drawn.axes[0].collections if isinstance(c, PathCollection)]
    kept, missed = (c.get_facecolor()[0] for c in points)
    assert tuple(missed[:3]) == (1.0, 1.0, 1.0) != tuple(kept[:3])
    notes = [text.get_text() for text in drawn.texts]
    assert any("b (1.030): active_flops differs from a's by more than 2 %" in t for t in notes)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b ‡"]


def test_bars_are_the_intervals_and_the_dashed_line_is_the_baseline():
    losses = {"a": (2.0, 2.02, 2.01), "b": (2.1, 2.13, 2.1)}
    found = [result(variant=v, seed=i, loss=x) for v, own in losses.items()
             for i, x in enumerate(own)]  # fmt: skip
    drawn = drawn_of("", found, baseline="a")
    from matplotlib.collections import LineCollection

    axes, _, differences = drawn.axes
    bars = [c.get_segments()[0] for c in axes.collections if isinstance(c, LineCollection)]
    for bar, own in zip(bars, losses.values(), strict=True):
        wanted = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
        assert sorted(bar[:, 1]) == pytest.approx(wanted)
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [pytest.approx(2.01)]
    (bar,) = (c.get_segments()[0] for c in differences.collections if isinstance(c, LineCollection))
    wanted = stats.ttest_rel(losses["b"], losses["a"]).confidence_interval(0.95)
    assert sorted(bar[:, 0]) == pytest.approx(list(wanted))
    assert [text.get_text() for text in differences.texts] == ["worse"]
    assert [label.get_text() for label in differences.get_yticklabels()] == ["b"]


def test_the_axis_is_the_cost_that_is_matched():
    found = [result(variant=v, total_parameters=n) for v, n in (("a", 1000), ("b", 2000))]
    drawn = drawn_of("", found, match="total_params", baseline="a")
    assert points_of(drawn.axes[0]) == [(1.0, 2.0), (2.0, 2.0)]
    drawn = drawn_of("", found, match="step_time", baseline="a")
    assert points_of(drawn.axes[1]) == [(0.1, 2.0), (0.1, 2.0)]


def test_an_axis_is_logarithmic_only_where_values_are_far_apart():
    assert drawn_of("", crowded(0, 5.2e6)).axes[0].get_xscale() == "log"
    assert drawn_of("", crowded(0, 3.1e6)).axes[0].get_xscale() == "linear"


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "found",
    [
        [PLAIN],
        [PLAIN, result(seed=1)],
        [result(seconds_per_step=math.nan, train_seconds=math.nan)],
        [PLAIN, result(seed=1, loss=math.nan), result(variant="lost", loss=math.nan)],
        [result(loss=math.nan)],
        [result(variant=f"variant_{i}", loss=2 + i / 100) for i in range(16)],
    ],
    ids=["one", "coincident", "no-times", "some-losses", "no-losses", "many"],
)
def test_odd_results_are_drawn_too(found: list[Result], tmp_path: Path):
    sweep = sweep_of(*((r.variant, r.seed) for r in found))
    figure.write_figure(tmp_path, "$title", found, compare(sweep, found, set()))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
