"""Pages drawn from the probe: their numbers are those of plain loops over its tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from moejax.analysis.figures import lift_cells
from moejax.analysis.html import render
from moejax.analysis.page import Figure
from moejax.analysis.pages import coactivation, router, specialisation, stability
from moejax.analysis.run import RunData
from tests import probes
from tests.analysis import workdirs
from tests.analysis.probed import (
    STEPS,
    Step,
    lines,
    panel,
    probe_of,
    run_of,
    spec,
    tables,
    texts,
    tokens_of,
    walk,
)

PAGES = (router.page, specialisation.page, coactivation.page, stability.page)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return run_of(tmp_path_factory.mktemp("probed") / "run")


# Maps of lifts.


def test_a_lift_of_1_is_neutral_and_the_scale_ends_at_8():
    lift = np.array([[1.0, 2.0, 100.0], [0.0, np.nan, 0.5]])
    cells = lift_cells(lift, np.array([[0.5, 0.0996, 0.0994], [0.0, np.nan, 0.0001]]))
    octaves = np.array(cells["z"])
    assert octaves[0].tolist() == [0, 1, 6.64386] and np.isnan(octaves[1, :2]).all()
    assert (cells["zmin"], cells["zmid"], cells["zmax"]) == (-3, 0, 3)
    assert cells["text"] == [["50%", "10%", "9.9%"], ["", "", "0.0%"]]
    assert cells["colorbar"]["ticktext"] == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]
    assert "text" not in lift_cells(np.ones((1, 40)), np.ones((1, 40)))
    assert lift_cells(np.full((1, 2), 1.5), np.ones((1, 2)))["zmax"] == 3  # on every map


# All pages.


def test_every_page_is_drawn_with_names_of_its_own(run: RunData):
    html = render("run", "", [page(run) for page in PAGES])
    found = [b for page in PAGES for b in walk(page(run).blocks) if isinstance(b, Figure)]
    assert len({figure.name for figure in found}) == len(found) and all(f.name for f in found)
    assert all(f'id="spec-{figure.name}"' in html for figure in found)
    assert all(figure.caption.endswith(".") for figure in found)


def test_a_run_without_a_probe_has_none_of_the_pages(tmp_path: Path):
    dense = RunData.read(workdirs.write(tmp_path / "dense"))
    assert [page(dense).blocks for page in PAGES] == [[]] * len(PAGES)


def test_non_finite_and_unchosen_values_are_gaps(tmp_path: Path):
    def broken(arrays: Step) -> Step:
        nan = {name: np.full_like(arrays[name], np.nan) for name in ("log_z", "collapse")}
        return arrays | nan | {"weight": np.zeros_like(arrays["weight"])}

    odd = run_of(tmp_path / "odd", change=broken)
    assert render("odd", "", [page(odd) for page in PAGES])
    assert np.isnan(panel(router.page(odd), "router-means", 3)[0]["y"]).all()


# Router.


def test_router_means_are_over_valid_tokens(run: RunData):
    page, valid_NL = router.page(run), probe_of(run).tokens["valid"]
    for number, name in enumerate(("entropy", "margin", "log_z", "max_logit"), start=1):
        for layer, trace in enumerate(panel(page, "router-means", number)[: probes.M]):
            expected = [probe_of(run).at(step)[name][layer][valid_NL].mean() for step in STEPS]
            assert trace["y"] == pytest.approx(expected, rel=1e-5)
            assert (trace["x"], trace["name"]) == (list(STEPS), f"layer {layer}")
    reference = panel(page, "router-means", 1)[-1]
    assert reference["y"] == pytest.approx([np.log(probes.E)] * 2)


def test_the_spread_is_quantiles_and_the_last_distribution_has_every_token(run: RunData):
    page, valid_NL = router.page(run), probe_of(run).tokens["valid"]
    margin_T = probe_of(run).at(STEPS[-1])["margin"][1][valid_NL]
    *edges, median = (trace["y"][-1] for trace in panel(page, "router-spread-1", 2))
    expected = np.quantile(margin_T, [0.05, 0.95, 0.25, 0.75])
    assert edges == pytest.approx(expected, rel=1e-5)
    assert median == pytest.approx(np.median(margin_T), rel=1e-5)
    [bars] = panel(page, "router-distribution-1", 2)
    assert sum(bars["y"]) == pytest.approx(1)
    mean = np.dot(bars["x"], bars["y"])
    assert mean == pytest.approx(margin_T.mean(), abs=bars["width"])


def test_measures_of_single_gates_are_drawn_where_they_were_logged(tmp_path: Path, run: RunData):
    assert not [b for b in walk(router.page(run).blocks) if getattr(b, "name", "") == "router-gate"]
    rows = [workdirs.row(step) | {"moe/gate/lambda": step / 10} for step in (10, 20)]
    workdirs.write(tmp_path / "remoe", rows)
    probes.write(tmp_path / "remoe")
    page = router.page(RunData.read(tmp_path / "remoe"))
    [trace] = panel(page, "router-gate", 1)
    assert (trace["x"], trace["y"]) == ([10, 20], [1.0, 2.0])


def test_a_gate_without_logits_is_reported_to_have_none(tmp_path: Path, run: RunData):
    def bare(arrays: Step) -> Step:
        return arrays | {"log_z": 1e-6 * arrays["log_z"]}

    assert "no logits" in texts(router.page(run_of(tmp_path / "hash", change=bare)))
    assert "no logits" not in texts(router.page(run))


# Specialisation.


def test_domain_shares_and_lifts_equal_those_of_a_count(run: RunData):
    found = tokens_of(run, STEPS[-1], layer=1)
    [cells] = spec(specialisation.page(run), "domains-1")["data"]
    pairs = [(label, expert) for chosen, _, _, label in found for expert in chosen]
    for label in range(len(probes.LABELS)):
        of_label = [expert for other, expert in pairs if other == label]
        for expert in range(probes.E):
            share = of_label.count(expert) / len(of_label)
            blind = sum(other == expert for _, other in pairs) / len(pairs)
            lift, written = cells["customdata"][label][expert]
            assert (written, lift) == pytest.approx((share, share / blind), abs=1e-5)
            assert cells["z"][label][expert] == pytest.approx(np.log2(share / blind), abs=1e-5)
        count = sum(other == label for *_, other in found)
        assert cells["y"][label] == f"{probes.LABELS[label]} ({count})"
    assert np.sum(np.array(cells["customdata"])[..., 1], axis=1) == pytest.approx([1, 1], abs=1e-4)


def test_a_corpus_without_labels_has_no_domains_and_reports_it(tmp_path: Path):
    page = specialisation.page(run_of(tmp_path / "plain", labels=False))
    assert "no domain labels" in texts(page)
    assert {row[1] for row in tables(page)[-1].rows} == {"token", "next token"}


def test_tokens_that_decide_their_expert_explain_everything(tmp_path: Path):
    """Token t goes to expert t mod E alone."""
    token_NL, valid_NL = (probes.tokens()[name] for name in ("token", "valid"))
    weight_NLK = np.stack([valid_NL, 0 * valid_NL], axis=-1)

    def decided(arrays: Step) -> Step:
        expert_NLK = np.stack([token_NL, token_NL], axis=-1) % probes.E
        return arrays | {
            "expert": np.stack([expert_NLK] * probes.M),
            "weight": np.stack([weight_NLK] * probes.M).astype(np.float32),
        }

    page = specialisation.page(run_of(tmp_path / "decided", change=decided))
    of_experts, *_, last = tables(page)
    for expert, row in enumerate(of_experts.rows):
        named = {part.split("\N{RIGHT DOUBLE QUOTATION MARK}")[0][1:] for part in row[3].split()}
        own = {f"t{t}" for t in range(expert, probes.V, probes.E)}
        assert named <= own and row[0] == str(expert)
    explained = {(row[0], row[1]): (float(row[2]), float(row[3]), row[6]) for row in last.rows}
    assert explained["0", "token"][0] == 1.0 and explained["0", "token"][2] == "1.000"
    assert explained["0", "token"][1] < 0.4 and explained["1", "domain"][0] < 0.2
    assert panel(page, "information", 1)[0]["y"] == pytest.approx([1] * len(STEPS))


# Co-activation and transitions.


def test_coactivation_and_transitions_equal_those_of_a_count(run: RunData):
    page = coactivation.page(run)
    layers = [tokens_of(run, STEPS[-1], layer) for layer in range(probes.M)]
    [together] = spec(page, "coactivation-0")["data"]
    [paths] = spec(page, "transitions-0")["data"]
    firsts = [(now[0][0], then[0][0]) for now, then in zip(layers[0], layers[1], strict=True)]
    for i in range(probes.E):
        rows = [chosen for chosen, *_ in layers[0] if i in chosen]
        for j in range(probes.E):
            expected = sum(j in row for row in rows) / len(rows) if i != j else np.nan
            np.testing.assert_allclose(together["z"][i][j], expected)
            share = firsts.count((i, j)) / len(firsts)
            blind = [sum(pair[side] == e for pair in firsts) for side, e in ((0, i), (1, j))]
            lift = share / (blind[0] * blind[1] / len(firsts) ** 2)
            assert paths["customdata"][i][j] == pytest.approx([lift, share], abs=1e-5)
    strongest = tables(page)[0].rows[0]
    assert strongest[2] == f"{np.nanmax(together['z']):.1%}"
    assert len(tables(page)[0].rows) == probes.E * (probes.E - 1) // 2


def test_one_choice_per_token_and_all_choices_are_described_in_words(tmp_path: Path):
    def first_alone(arrays: Step) -> Step:
        weight = arrays["weight"].copy()
        weight[..., 1:] = 0
        return arrays | {"weight": weight}

    page = coactivation.page(run_of(tmp_path / "one", change=first_alone))
    assert "no co-activation to show" in texts(page)
    assert [b.name for b in walk(page.blocks) if isinstance(b, Figure)] == ["transitions-0"]

    def both(arrays: Step) -> Step:
        similar = {n: np.zeros((probes.M, 2, 2)) for n in arrays if n.endswith("similarity")}
        return arrays | {"expert": arrays["expert"] * 0 + [0, 1], "num_experts": 2} | similar

    page = coactivation.page(run_of(tmp_path / "both", change=both))
    assert "chose all experts" in texts(page)


# Stability.


def test_churn_and_saturation_equal_those_of_a_count(run: RunData):
    page = stability.page(run)
    for layer in range(probes.M):
        then = [[chosen for chosen, *_ in tokens_of(run, step, layer)] for step in STEPS]
        moved = [
            np.mean([a[0] != b[0] for a, b in zip(before, after, strict=True)])
            for before, after in zip(then, then[1:], strict=False)
        ]
        assert lines(page, "churn")[f"layer {layer}"] == pytest.approx(moved)
        kept = [
            [len(set(a) & set(b)) / probes.K for a, b in zip(each, then[-1], strict=True)]
            for each in then
        ]
        found = lines(page, "saturation-all")[f"layer {layer}"]
        assert found == pytest.approx(np.mean(kept, axis=1)) and found[-1] == 1
        first = [
            np.mean([a[0] == b[0] for a, b in zip(each, then[-1], strict=True)]) for each in then
        ]
        assert lines(page, "saturation-first")[f"layer {layer}"] == pytest.approx(first)
    assert lines(page, "saturation-all")["by chance"] == [probes.K / probes.E] * 2
    assert lines(page, "saturation-first")["by chance"] == [1 / probes.E] * 2
    assert spec(page, "churn")["data"][0]["x"] == list(STEPS[1:])


def test_similarity_and_representation_are_what_was_recorded(tmp_path: Path):
    cosine_EE = np.full((probes.E, probes.E), 0.25) + 0.75 * np.eye(probes.E)
    same = {name: np.stack([cosine_EE] * probes.M) for name in stability.SIMILARITIES}
    page = stability.page(run := run_of(tmp_path / "alike", change=lambda a: a | same))
    assert panel(page, "similarity", 1)[0]["y"] == [0.25] * len(STEPS)
    [cells] = spec(page, "router-similarity-1")["data"]
    off = ~np.eye(probes.E, dtype=bool)
    assert (np.array(cells["z"])[off] == 0.25).all() and np.isnan(np.diagonal(cells["z"])).all()
    for number, name in enumerate(("collapse", "participation"), start=1):
        expected = [float(probe_of(run).at(step)[name][1]) for step in STEPS]
        assert panel(page, "representation", number)[1]["y"] == expected


def test_one_recording_and_a_gate_without_vectors_are_described_in_words(tmp_path: Path):
    page = stability.page(run_of(tmp_path / "short", steps=(0,), router=False))
    assert "need two recordings" in texts(page) and "no vector per expert" in texts(page)
    names = {b.name for b in walk(page.blocks) if isinstance(b, Figure)}
    assert not names & {"churn", "saturation-all", "router-similarity-0"}
    assert json.dumps(spec(page, "representation"))
