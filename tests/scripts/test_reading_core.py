"""scripts/reading_core.py counts the path of a training step, its types, and nothing beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_reading_core_is_the_path_of_a_step_with_its_types(tmp_path):
    script, out = str(ROOT / "scripts" / "reading_core.py"), tmp_path / "core.json"
    subprocess.run([sys.executable, script, "--json", str(out)], check=True, cwd=tmp_path)
    core = json.loads(out.read_text())
    reasons = {row["file"]: row["reason"] for row in core["rows"]}
    for file in ("train/step.py", "layers/moe.py", "gating/top_k.py", "losses.py"):
        assert reasons[f"moejax/{file}"] == "run"
    assert reasons["moejax/types.py"] in ("run", "type")
    rooms = {file.split("/")[1] for file in reasons}
    assert not {"sweep", "analysis", "record", "cli", "data", "job"} & rooms
    assert "moejax/gating/hash.py" not in reasons, "one gate"
    for row in core["rows"]:
        assert row["lines"] == len((ROOT / row["file"]).read_text().splitlines())
    assert core["core"]["lines"] == sum(row["lines"] for row in core["rows"])
