"""docs/recorded.md: its tables are the files' own, and its code runs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas
import pytest

from moejax.record import probe
from moejax.train.probe import arrays
from tests import probes
from tests.train import runs
from tests.train.sharing import Whole

TEXT = (Path(__file__).parents[2] / "docs" / "recorded.md").read_text()


def table(after: str) -> dict[str, list[str]]:
    """The first table after a line: its rows by their first cell."""
    lines = TEXT[TEXT.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = {}
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = cells
    return rows


def check_table(after: str, formats: Mapping[str, probe.ArrayFormat]) -> None:
    """Raises AssertionError unless the table after a line has exactly these arrays."""
    shown = table(after)
    wanted = {name: (known.dtype, known.axes) for name, known in formats.items()}
    assert {name: (cells[0], cells[1].replace(", ", "")) for name, cells in shown.items()} == wanted
    assert all(cells[2] for cells in shown.values())


@pytest.mark.parametrize(
    "after, formats",
    [
        ("\n`tokens.npz`:", lambda: probe.TOKENS),
        ("\n`step-*.npz`:", arrays.formats),
    ],
)
def test_the_tables_list_the_arrays_that_files_are_checked_against(after, formats):
    check_table(after, formats())


def test_a_new_array_needs_a_line_in_the_table(monkeypatch):
    entry = arrays.TokenArray("float32", "MNL", lambda x_BLD, info: x_BLD[..., 0])
    monkeypatch.setitem(arrays.ARRAYS, "first_input", entry)
    with pytest.raises(AssertionError, match="first_input"):
        check_table("\n`step-*.npz`:", arrays.formats())


@pytest.mark.slow
def test_every_key_and_every_file_of_a_run_is_named(whole: Whole):
    keys, timings = table("## metrics.jsonl"), table("## timings.jsonl")
    found = {
        re.sub(r"^(aux|baseline|moe/gate)/.*", r"\1/NAME", k)
        for row in runs.rows(whole.workdir)
        for k in row
    }
    assert found - keys.keys() == set()
    others = {"moe/gate/NAME", "mod/NAME"}
    assert keys.keys() - found <= others, "Drifting has no means of its own, the run no depths"
    rows = (whole.workdir / "timings.jsonl").read_text().splitlines()
    assert {key for row in rows for key in json.loads(row)} == timings.keys()
    files = {path.name for path in whole.workdir.iterdir()}
    assert files <= {name.rstrip("/") for name in table("| file |")}


def test_the_code_gives_long_tables_of_a_runs_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Path("runs/mixtral")
    probes.write(workdir)
    loads = [[[3, 1, 0, 4], [2, 2, 2, 2]], [[5, 1, 1, 1], [0, 8, 0, 0]]]
    with open(workdir / "metrics.jsonl", "w") as file:
        for step, load in zip((10, 20), loads, strict=True):
            row = {"step": step, "loss": 2 - step / 100, "moe/max_vio": 0.5, "moe/drop_rate": 0.0}
            for split in ("train", "eval"):
                file.write(json.dumps({**row, "split": split, "moe/load": load}) + "\n")
    metrics, visits = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    shown: dict = {}
    exec(metrics, shown)
    assert shown["held_out"]["loss"].to_dict() == {10: 1.9, 20: 1.8}
    assert shown["load"].set_index(["step", "layer", "expert"])["pairs"][20, 1, 1] == 8
    exec(visits, shown)
    pairs, valid = shown["pairs"], probes.tokens()["valid"]
    assert isinstance(pairs, pandas.DataFrame)
    assert len(pairs) == 3 * probes.M * probes.K * valid.sum()
    found = probe.Probe.read(workdir)
    assert found is not None
    for line in pairs.sample(50, random_state=0).to_dict("records"):
        at = tuple(line[axis] for axis in ("layer", "sequence", "position", "column"))
        for name in ("expert", "weight", "kept"):
            assert line[name] == found.at(line["step"])[name][at]
        assert line["text"] == f"t{found.tokens['token'][line['sequence'], line['position']]}"
    one = pairs[(pairs["step"] == 20) & (pairs["layer"] == 1) & (pairs["text"] == "t3")]
    assert shown["visits"][20, 1, "t3"].to_dict() == pytest.approx(
        {e: (one["expert"] == e).mean() for e in set(one["expert"])}
    )
