"""``moejax report RUN --openmoe`` on a run of seconds."""

import json

import numpy as np
import pytest

from tests.train import runs

STEPS, ROWS, LENGTH, EXPERTS = 4, 24, 16, 4
FIRST_COME = "first come, 1.25 x mean load"
CELLS = ["--config.moe.eval_transport=cells", "--config.moe.eval_capacity_factor=1.25"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose held-out text has more rows than are asked for, and another text."""
    folder = tmp_path_factory.mktemp("openmoe")
    text = runs.write_text(folder / "text", letters=600)
    command = runs.command(
        folder / "run", text, train__steps=STEPS, train__checkpoint_every=2,
        train__keep_checkpoints=3, moe__gate__name="top_k", mesh__expert=1,
        report__probe_rows=16,
    )  # fmt: skip
    assert runs.call(command).status == 0
    (folder / "digits.txt").write_text(" ".join(map(str, range(300))))
    return folder


@pytest.fixture(scope="module")
def reported(run):
    """The output of the command, and its numbers."""
    ended = runs.call(
        ["report", str(run / "run"), "--openmoe", f"--rows={ROWS}", f"--data={run}/digits.txt"]
    )
    assert ended.status == 0, ended.err
    return ended.out, json.loads((run / "run" / "openmoe.json").read_text())


def drops(numbers, text, arm):
    return next(x for x in numbers["drops"] if (x["text"], x["arm"]) == (text, arm))


@pytest.mark.slow
def test_openmoe_prints_three_lines_and_writes_a_page_and_the_numbers(run, reported):
    out, numbers = reported
    lines = [f"{v['finding']}: {v['answer']}. {v['because']}" for v in numbers["verdicts"]]
    assert len(lines) == 3 and all(line in out.splitlines() for line in lines)
    html = (run / "run" / "report.html").read_text()
    assert "OpenMoE&#x27;s findings" in html and 'id="openmoe-early"' in html
    assert (numbers["run"], numbers["step"], numbers["steps"]) == ("run", STEPS, STEPS)
    assert numbers["num_experts"] == EXPERTS
    assert numbers["specialisation"]["tokens"] == ROWS * LENGTH
    assert {"token id", "previous token id", "position"} == numbers["specialisation"][
        "information"
    ].keys()


@pytest.mark.slow
def test_drops_equal_those_of_an_evaluation_with_the_same_slots(run, reported):
    _, numbers = reported
    own = drops(numbers, "held out", FIRST_COME)
    ended = runs.call(
        ["eval", f"--workdir={run / 'run'}", f"--config.train.eval_rows={ROWS}", *CELLS]
    )
    row = json.loads(ended.out)
    assert row["moe/drop_rate"] > 0
    assert own["rate"]["value"] == pytest.approx(row["moe/drop_rate"])
    pairs = ROWS * 2 * 2  # rows, layers, choices
    expected_L = np.sum(row["moe/dropped_by_position"], axis=0) / pairs
    np.testing.assert_allclose(own["choices"], expected_L)
    layer = np.sum(row["moe/dropped"], axis=1) / (ROWS * LENGTH * 2)
    np.testing.assert_allclose(own["by_layer"], layer)


@pytest.mark.slow
def test_more_slots_drop_less_dropless_nothing_and_one_choice_has_one_column(reported):
    _, numbers = reported
    for text in ("held out", "digits.txt"):
        rates = [
            drops(numbers, text, f"first come, {factor} x mean load")["rate"]["value"]
            for factor in (1, 1.25, 2)
        ]
        assert rates == sorted(rates, reverse=True) and rates[0] > 0
        assert drops(numbers, text, "dropless")["rate"]["value"] == 0
        assert drops(numbers, text, "batch-prioritised, 1.25 x mean load")["k"] == 2
        assert drops(numbers, text, f"{FIRST_COME}, k=1")["k"] == 1
        assert drops(numbers, text, f"{FIRST_COME}, k=1")["rows"] == ROWS


@pytest.mark.slow
def test_recordings_of_the_run_are_compared_up_to_the_checkpoint(run, reported):
    _, numbers = reported
    early = numbers["early"]
    assert early["source"] == "the recorded probe" and early["last"] == STEPS
    assert early["steps"][0]["step"] == 0 and early["steps"][-1]["saturation"] == [1, 1]
    assert all(0 <= x <= 1 for then in early["steps"] for x in then["saturation"])


@pytest.mark.slow
def test_a_run_without_a_probe_is_compared_by_its_checkpoints(run, tmp_path):
    copy = runs.copy(run / "run", tmp_path / "run")
    for path in (copy / "probe").iterdir():
        path.unlink()
    (copy / "probe").rmdir()
    ended = runs.call(["report", str(copy), "--openmoe", f"--rows={ROWS}", "--step=2"])
    assert ended.status == 0, ended.err
    early = json.loads((copy / "openmoe.json").read_text())["early"]
    assert early["source"] == "checkpoints" and early["chance"] == [0.5, 0.5]
    assert [then["step"] for then in early["steps"]] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--openmoe", "--rows=19"], ["--rows=19 must be at least 20"]),
        (["--openmoe", "--data=/nowhere"], ["--data=/nowhere does not exist"]),
        (["--openmoe", "--step=3"], ["3"]),
        (["--rows=30"], ["--rows has no effect without --openmoe"]),
    ],
)
def test_a_mistake_is_reported_in_one_line(run, flags, parts):
    ended = runs.call(["report", str(run / "run"), *flags])
    assert ended.status == 2 and ended.err.count("\n") == 1, ended.err
    for part in parts:
        assert part in ended.err


@pytest.mark.slow
def test_texts_too_short_for_intervals_and_of_one_name_are_refused(run):
    (run / "short.txt").write_text("a" * 40)
    command = ["report", str(run / "run"), "--openmoe", f"--rows={ROWS}"]
    runs.refused([*command, f"--data={run}/short.txt"], "short.txt has 2 rows")
    runs.refused([*command, f"--data={run}/text", f"--data={run}/text"], "names of their own")


@pytest.mark.slow
def test_a_dense_run_has_no_findings(run):
    command = runs.command(
        run / "dense", run / "text", train__steps=1, moe__every=0, moe__gate__name="top_k"
    )
    assert runs.call(command).status == 0
    runs.refused(["report", str(run / "dense"), "--openmoe"], "moe.every=0", "routes nothing")
