import pytest

from moejax.sweep import budget, runner
from tests.sweep.small import no_budget, no_report, small_command


@pytest.fixture
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of sweeps in this process are small programs."""
    monkeypatch.setattr(runner, "train_command", small_command)
    monkeypatch.setattr(runner, "report", no_report)
    monkeypatch.setattr(budget, "announce", no_budget)
