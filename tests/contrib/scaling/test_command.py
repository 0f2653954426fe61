"""The scaling command: its output, files, figure and refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from moejax import cli
from moejax.contrib.scaling import figure, table
from moejax.contrib.scaling.runs import DENSE, read_source
from moejax.contrib.scaling.study import make_study
from tests.contrib.scaling.sources import (
    LAW,
    SIZES,
    curve,
    runs_of,
    trial,
    write_curves,
    write_sweep,
)  # fmt: skip

WORSE = dataclasses.replace(LAW, d=LAW.d + 0.01)


def curves(path: Path, noise: float = 0.002) -> Path:
    """Two routers with the paper's names, one 2.3 % above the other, and what both start from."""
    first, second = runs_of(LAW, noise=noise), runs_of(WORSE, noise=noise)
    runs = [dataclasses.replace(run, router="S-Base") for run in first if run.experts > 1]
    runs += [dataclasses.replace(run, router="Hash") for run in second if run.experts > 1]
    runs += [dataclasses.replace(run, router=DENSE) for run in first if run.experts == 1]
    return write_curves(path, [curve(number, run) for number, run in enumerate(runs)])


def sweep(folder: Path) -> Path:
    """Two routers of one size; the differences between seeds are the same in both."""
    rng = np.random.default_rng(0)
    scatter = {(e, s): 0.002 * rng.normal() for e in (1, 2, 4, 8, 16, 32) for s in range(3)}
    trials = [trial("dense", "switch", 8, every=0)]
    for gate in ("sbase", "hash"):
        trials += [trial(f"{gate}_{e}", gate, e) for e in (2, 4, 8, 16, 32)]
    return write_sweep(folder, trials, lambda e, s: 2 * e**-0.03 + scatter[e, s])


def test_two_sources_give_one_page_of_numbers_and_the_same_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, out = curves(tmp_path / "curves.csv.gz"), tmp_path / "law.json"
    assert cli.main(["scaling", str(path), f"--out={out}", "--resamples=40"]) == 0
    text, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    study = make_study(read_source(str(path)), resamples=40)
    for each in study.routers:
        saved = numbers["routers"][each.router]
        assert saved["law"] == "full" and saved["coefficients"]["b"]["value"] == each.law.b
        assert saved["errors"]["cell"]["largest"] == each.cell.largest  # pyright: ignore[reportOptionalMemberAccess]
        assert len(saved["runs"]) == len(each.runs) == 24
        assert f"{each.law.b:.4f}" in text and table.number(each.law.cutoff) in text
        assert f"{each.router}: 24 of 24 runs of held-out cells are predicted within 2 %." in text
    assert numbers["routers"]["Hash"]["paper"]["N_cutoff"] == 83e9
    assert "Order, lowest loss first: S-Base, Hash in 20 of 20 cells. In 0 of them" in text
    assert [r["order"] for r in numbers["order"]] == [["S-Base", "Hash"]] * 20
    assert "nothing was run with a second seed, so all is unclear" in text
    assert numbers["pairs"][0]["cells"][0]["half_width"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv.gz", "law.json"]


def test_a_router_fitted_alone_has_the_same_fit_as_among_others(tmp_path: Path):
    source = read_source(str(curves(tmp_path / "c.csv")))
    alone, both = make_study(source, ["Hash"], 40), make_study(source, [], 40)
    assert alone.routers == (both.routers[1],) and alone.pairs == {} and alone.rankings == ()


def test_a_sweep_of_one_size_gets_the_reduced_law_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = sweep(tmp_path / "experts"), tmp_path / "law.json"
    assert cli.main(["scaling", str(folder), f"--out={out}", "--resamples=40"]) == 0
    text, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert "log10 L = b log10 Eh + d\n" in text and "a log10 N" not in text
    assert "sbase: one size only (2.05k), so a, c and N_cutoff are not determined" in text
    assert "paper" not in text and "Effective" not in text and "33 finished trials" in text
    assert numbers["routers"]["sbase"]["errors"]["size"] is None
    # The same losses at every seed: no difference, and no doubt about it.
    assert {c["half_width"] for c in numbers["pairs"][0]["cells"]} == {0.0}


def test_the_papers_full_law_is_not_compared_with_a_reduced_one(tmp_path: Path):
    runs = [dataclasses.replace(run, router="Hash") for run in runs_of(LAW, sizes=SIZES[:1])]
    path = write_curves(tmp_path / "c.csv", [curve(n, run) for n, run in enumerate(runs)])
    (found,) = make_study(read_source(str(path)), resamples=40).routers
    assert found.law.reduced and found.paper is None and found.effective == ()


def test_seeds_give_every_cell_an_interval(tmp_path: Path):
    """sbase is lower by 0.1 at 4 experts, and by nothing but scatter elsewhere."""
    rng = np.random.default_rng(0)
    trials = [trial(f"{g}_{e}", g, e) for g in ("sbase", "hash") for e in (1, 2, 4, 8, 16)]
    folder = write_sweep(tmp_path / "s", trials, lambda e, s: 2 + 0.01 * rng.normal())
    lines = (folder / "results.csv").read_text().splitlines()
    changed = [
        ",".join([*cells[:3], str(float(cells[3]) - 0.1), cells[4]])
        if (cells := line.split(","))[0] == "sbase_4"
        else line
        for line in lines
    ]
    (folder / "results.csv").write_text("\n".join(changed))
    study = make_study(read_source(str(folder)), resamples=40)
    found = study.pairs["sbase", "hash"]
    assert [c.cell[1] for c in found] == [2, 4, 8, 16] and {c.seeds for c in found} == {3}
    assert [c.sign for c in found if c.cell[1] == 4] == [-1]


def test_missing_saturation_is_reported(tmp_path: Path):
    trials = [trial(f"sbase_{e}", "sbase", e) for e in (1, 2, 4, 8, 16, 32)]
    folder = write_sweep(tmp_path / "s", trials, lambda e, s: 2 * (e + 1) ** -0.03, seeds=1)
    text = table.render(make_study(read_source(str(folder)), resamples=40))
    assert "E_max ended on a bound of the search" in text


def test_the_picture_has_every_run_once_and_a_law_per_size(tmp_path: Path):
    study = make_study(read_source(str(curves(tmp_path / "c.csv"))), resamples=40)
    drawn = figure.figure(study)
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["S-Base", "Hash"]
    for axes, each in zip(drawn.axes, study.routers, strict=True):
        points = np.concatenate([np.asarray(dots.get_offsets()) for dots in axes.collections])
        assert sorted(map(tuple, points)) == sorted((r.experts, r.loss) for r in each.runs)
        assert len(axes.lines) == len(SIZES)
        assert {text.get_text() for text in axes.texts} == {"15M", "55M", "370M", "1.3B"}


def test_losses_that_are_close_look_close():
    _, panels = figure._panels(1)
    panels[0].plot([1, 8], [2.0, 2.004])
    figure._finish(panels, [[]], [1, 8], least=0.05)
    low, high = panels[0].get_ylim()
    assert 0.004 / (high - low) < 0.1 and low < 2.0 < 2.004 < high


def test_compared_losses_are_relative_to_one_expert_and_names_share_colours(
    tmp_path: Path,
):
    other = read_source(str(curves(tmp_path / "c.csv", noise=0)))
    study = make_study(read_source(str(sweep(tmp_path / "experts"))), resamples=40)
    ours, theirs = figure.beside(study, other).axes
    for axes in (ours, theirs):
        for dots in axes.collections:
            points = np.asarray(dots.get_offsets())
            assert np.mean(points[points[:, 0] == 1, 1]) == pytest.approx(1.0)
    for dots, size in zip(theirs.collections, (SIZES[0], SIZES[-1]), strict=False):
        expected = LAW.loss(size, 512) / LAW.loss(size, 1)
        assert np.asarray(dots.get_offsets()).tolist()[-1] == pytest.approx([512, expected])
    left, right = ({t.get_text(): t.get_color() for t in axes.texts} for axes in (ours, theirs))
    assert left["sbase"] == right["S-Base 15M"] == right["S-Base 1.3B"]
    assert left["hash"] == right["Hash 15M"] != left["sbase"]


def test_the_command_writes_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, picture = curves(tmp_path / "c.csv"), tmp_path / "law.png"
    words = ["scaling", str(sweep(tmp_path / "experts")), f"--figure={picture}", "--resamples=40"]
    assert cli.main([*words, f"--beside={path}"]) == 0
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 800 and height > 400


MISTAKES: dict[str, list[str]] = {
    "scaling {curves} --resamples=40 --figure={folder}/x.png --beside={routed}": [
        "routed.csv: R has no run with E=1"
    ],
    "scaling": ["SOURCE", "moejax scaling --help"],
    "scaling {nothing}": ["nothing does not exist", "a sweep's folder"],
    "scaling {curves} --router=Hsah": ["--router=Hsah", "did you mean 'Hash'"],
    "scaling {few}": ["R: 4 distinct (size, experts)", "the full law needs 8", "--router"],
    "scaling {dense}": ["no runs with experts"],
    "scaling {curves} --resamples=5": ["--resamples=5 must be at least 40"],
    "scaling {curves} --resamples=x": ["--resamples", "'x'"],
    "scaling {curves} --beside={curves}": ["no effect without --figure"],
    "scaling {curves} --figure={folder}/no/law.png": ["a folder that exists"],
    "scaling {curves} --figure={folder}/law.svg": ["must end in .png"],
    "scaling {curves} --out={folder}": ["must name a file"],
    "scaling {curves} --outt=x": ["unknown flag --outt", "--out"],
    "scaling {curves} --resamples=40 --figure={folder}/x.png --beside={few}": [
        "few.csv: R: 4 distinct (size, experts)"
    ],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_reported_in_one_line_and_creates_nothing(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    routed = [curve(n, run) for n, run in enumerate(runs_of(LAW)) if run.experts > 1]
    few = [curve(n, run) for n, run in enumerate(runs_of(LAW)) if run.experts == 8]
    dense = [curve(0, dataclasses.replace(runs_of(LAW)[0], router=DENSE))]
    places: dict[str, Any] = {
        "curves": curves(tmp_path / "c.csv"),
        "few": write_curves(tmp_path / "few.csv", few),
        "routed": write_curves(tmp_path / "routed.csv", routed),
        "dense": write_curves(tmp_path / "dense.csv", dense),
        "nothing": tmp_path / "nothing",
        "folder": tmp_path,
    }
    before = sorted(tmp_path.iterdir())
    assert cli.main([word.format(**places) for word in line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: error: ") and error.count("\n") == 1, error
    assert all(part in error for part in MISTAKES[line]), error
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_are_short():
    values = [0.5, 1.8472, 314.478, 999.4, 1000, 16527360, 936.7e9, 18.96e12, 3.62e3, 99.97e6]
    assert [table.number(value) for value in values] == [
        "0.5", "1.85", "314", "999", "1k", "16.5M", "937B", "19T", "3.62k", "100M",
    ]  # fmt: skip
