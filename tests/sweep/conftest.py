import pytest

from moejax.sweep import budget, runner, summary
from tests.sweep.small import no_budget, no_report, no_summary, small_command


@pytest.fixture
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of sweeps in this process are small programs."""
    monkeypatch.setattr(runner, "train_command", small_command)
    monkeypatch.setattr(runner, "report", no_report)
    monkeypatch.setattr(budget, "announce", no_budget)
    monkeypatch.setattr(summary, "write", no_summary)
