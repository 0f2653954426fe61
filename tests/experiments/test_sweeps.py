"""The sweeps that ship expand, and their pages state what they compare and how to run them."""

from pathlib import Path

import pytest

from moejax.sweep.definition import expand

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "experiments").glob("*/sweep.py"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_question_in_the_readme_has_a_folder():
    readme = (ROOT / "README.md").read_text()
    named = {path.parent.name for path in (ROOT / "experiments").glob("*/README.md")}
    assert {path.parent.name for path in SWEEPS} < named
    assert all(f"experiments/{name}/README.md" in readme for name in named)


@pytest.mark.parametrize("page", SWEEPS, ids=lambda page: page.parent.name)
def test_a_sweep_runs_every_variant_with_three_seeds_against_a_baseline(page: Path):
    sweep = expand(str(page.relative_to(ROOT)))
    assert len(sweep.trials) == 3 * len(sweep.variants)
    assert sweep.comparison.baseline in sweep.variants
    for variant in sweep.variants:
        assert [trial.seed for trial in sweep.trials if trial.variant == variant] == [0, 1, 2]


@pytest.mark.parametrize("page", SWEEPS, ids=lambda page: page.parent.name)
def test_the_longer_setting_changes_the_length_only(page: Path):
    path = str(page.relative_to(ROOT))
    short, long = (expand(f"{path}:seeds=1{more}").trials for more in ("", ",longer=5"))
    for one, other in zip(short, long, strict=True):
        assert other.steps == 5 * one.steps
        for section in ("model", "moe", "optim", "data"):
            assert one.config[section] == other.config[section]


def test_variants_can_be_chosen_without_the_baseline():
    sweep = expand("experiments/gating/sweep.py:only=switch+base,seeds=1")
    assert sweep.variants == ["switch", "base"] and sweep.comparison.baseline is None


@pytest.mark.parametrize("page", SWEEPS, ids=lambda page: page.parent.name)
def test_a_page_beside_the_sweep_has_its_command_cost_and_verdict(page: Path):
    text = (page.parent / "README.md").read_text()
    assert f"--experiment=experiments/{page.parent.name}/sweep.py" in text
    assert all(part in text for part in ("**Question.**", "**Cost.**", "## Measured", "## Verdict"))
