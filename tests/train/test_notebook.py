"""``moejax.load``: a run's checkpoint for a notebook, and the page that shows how."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.errors import UserError
from tests.train import runs
from tests.train.sharing import Whole

PAGE = (Path(__file__).parents[2] / "docs" / "notebook.md").read_text()


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/x").symlink_to(whole.workdir)
    monkeypatch.chdir(tmp_path)
    before, shown = runs.files(whole.workdir), {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), shown)
    run, row = shown["run"], runs.rows(whole.workdir, "eval")[-1]
    assert shown["logits_BLV"].shape == (1, len("def __init__(self"), 256)
    # The module, called by hand, and the task's own way to it: another fusion of the same sums.
    np.testing.assert_allclose(shown["same_BLV"], run.logits(shown["token_BL"]), atol=1e-5)
    assert shown["held_out"].loc[row["step"], "loss"] == row["loss"]
    assert shown["seconds"] > 0 and shown["load_ME"].shape == (2, 4)
    assert shown["figure"].layout.title.text == "load in training"
    assert runs.files(whole.workdir) == before, "a notebook writes nothing"


def test_the_loaded_model_has_the_runs_held_out_loss(whole: Whole):
    """On one device; the run had two."""
    run, row = moejax.load(whole.workdir), runs.rows(whole.workdir, "eval")[-1]
    assert run.step == row["step"] and run.mesh.size == 1 and run.config.mesh.expert == 2
    nats, tokens = 0.0, 0
    for batch in run.data.eval_batches(8, run.config.train.eval_rows):
        rows = {name: jnp.asarray(x) for name, x in batch.items()}
        loss_BL = run.task.token_losses(run.apply(rows)[0], rows)
        nats += float(np.sum(np.asarray(loss_BL), where=batch["valid"]))
        tokens += int(batch["valid"].sum())
    assert nats / tokens == pytest.approx(row["loss"], rel=1e-5)  # float32 sums in another order


def test_a_text_survives_the_tokenizer(whole: Whole):
    _, _, tokenizer, _ = moejax.load(whole.workdir)
    text = "naïve\n\tcafé"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_every_figure_of_the_report_is_plotlys(whole: Whole):
    run = moejax.load(whole.workdir)
    names = run.figures()
    assert {"loss", "load-training", "drop-rate"} <= set(names)
    for name in names:
        figure = run.figure(name)
        assert figure.layout.meta["caption"] and figure.layout.height
        assert not re.search(r'"(C\d|ink|quiet)"', json.dumps(figure.to_plotly_json(), default=str))


def test_mistakes_are_reported_in_one_line(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sweep.json").write_text("{}")
    run, real = moejax.load(whole.workdir), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for said, call in {
        "workdir of a run": lambda: moejax.load(tmp_path / "none"),
        "is a sweep": lambda: moejax.load(tmp_path),
        "step": lambda: moejax.load(whole.workdir, step=10**6),
        "train.stepps": lambda: moejax.load(whole.workdir, overrides=["train.stepps=1"]),
        "choose from overview-loss, loss": lambda: run.figure("nonsense"),
        "batches, from 0": lambda: run.batch(-1),
        "pip install pandas": lambda: run.metrics(),
    }.items():
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said) as refused:
            patch.setattr(builtins, "__import__", without)
            call()
        assert "\n" not in str(refused.value)
