"""The report of runs that were trained, not made up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moejax import cli
from tests.train import runs

pytestmark = pytest.mark.slow


def test_a_measured_leak_is_reported(tmp_path: Path, capsys: Any):
    """The same numbers as `moejax eval --measure-leak` gives."""
    text, workdir = runs.write_text(tmp_path / "text"), tmp_path / "run"
    changes = {
        "moe__gate__name": "expert_choice", "moe__allow_future_leak": True,
        "moe__losses__load": 0.0, "train__steps": 3, "train__seq_len": 4, "mesh__expert": 1,
        "report__probe_rows": 4,
    }  # fmt: skip
    ended = runs.call(runs.command(workdir, text, **changes))
    assert ended.status == 0, ended.err
    measured = runs.call(["eval", f"--workdir={workdir}", "--measure-leak=4"])
    row = json.loads(measured.out)
    assert cli.main(["report", str(workdir), "--measure-leak=4"]) == 0
    written = (workdir / "report.html").read_text()
    assert f"Measured in evaluation: {row['leak/nats_per_token']:.4f} nats/byte" in written
    assert f"{row['leak/tokens']} held-out tokens" in written
    menu = re.findall(r'<a href="#[\w-]+">([^<]+)</a>', written)
    assert {"Overview", "Load", "Cost"} < set(menu) and len(menu) == 9
    # A report beside a run is in nobody's way: the run still knows that it is complete.
    again = runs.call(runs.command(workdir, text, **changes))
    assert again.status == 0 and "is complete at step 3" in again.out
