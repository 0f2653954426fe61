"""Gates by name: one file and one line each, imported when asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moejax import gating
from moejax.gating.presets import PRESETS

FOLDER = Path(gating.__file__).parent
SHARED = {"__init__", "gate", "ops", "presets", "registry", "spans", "visibility"}
"""Modules beside the gates."""


def test_every_file_except_the_shared_ones_is_one_gate_of_the_table():
    modules = [entry.target.partition(":")[0] for entry in gating.GATES.values()]
    assert len(modules) == len(set(modules))
    assert {file.stem for file in FOLDER.glob("*.py")} - SHARED == set(modules)


@pytest.mark.parametrize("name", gating.GATES)
def test_a_name_makes_the_class_that_the_table_lists(name):
    module, _, attribute = gating.GATES[name].target.partition(":")
    gate = type(gating.make(name))
    assert (gate.__module__, gate.__name__) == (f"moejax.gating.{module}", attribute)
    assert getattr(gating, attribute) is gate and attribute in gating.__all__


def test_every_name_is_either_a_gate_or_a_preset():
    assert not set(gating.GATES) & set(PRESETS)
    assert gating.names() == sorted([*gating.GATES, *PRESETS])
    assert {preset.gate for preset in PRESETS.values()} <= set(gating.GATES)


@pytest.mark.parametrize("name", gating.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(gating, name) is not None and name in dir(gating)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'TopL'"):
        _ = gating.TopL


LOADED = """
import json, sys
from moejax import gating
def loaded():
    return sorted(m for m in sys.modules if m.startswith("moejax.gating."))
before = loaded()
gating.make("mixtral")
print(json.dumps([before, loaded()]))
"""


def test_a_gates_module_is_imported_on_first_use():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    before, after = json.loads(done.stdout)
    assert before == ["moejax.gating.presets", "moejax.gating.registry"]
    gates = {module.rpartition(".")[2] for module in after} - SHARED
    assert gates == {"top_k"}
