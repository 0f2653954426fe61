"""The summary picture, checked through the objects that it draws and the file that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.train.workdir.summary import summary_figure, write_summary_png


def write_run(folder: Path, rows: list[dict], moe: bool = True) -> str:
    folder.mkdir()
    config = {
        "mesh": {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1},
        "model": {"num_layers": 2},
        "moe": {"num_experts": 3, "transport": "cells", "gate": {"name": "mixtral"}},
    }
    saved = {"config": config, "baselines": {"bigram": 2.5, "trigram": 2.0}}
    (folder / "config.json").write_text(json.dumps(saved))
    keep = (lambda key: True) if moe else (lambda key: not key.startswith("moe/"))
    lines = [json.dumps({k: v for k, v in row.items() if keep(k)}) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def rows(count: int = 10, leak: str = "") -> list[dict]:
    """``count`` training rows and a last evaluation; two MoE layers of three experts."""
    found = []
    for i in range(1, count + 1):
        found.append(
            {
                "step": 10 * i,
                "split": "train",
                "loss": 3.0 / i,
                "accuracy": 0.1 * i,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "moe/max_vio": 0.5,
                "moe/drop_rate": 0.25,
                "moe/load": [[20, 10, 30], [20, 40, 0]],
                "leak": leak,
            }
        )
    return [*found, found[-1] | {"split": "eval", "loss": 1.23456, "bits_per_byte": 1.5}]


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def heatmaps(figure) -> list[np.ma.MaskedArray]:
    from matplotlib.collections import QuadMesh

    found = figure.findobj(QuadMesh)
    return [mesh.get_array() for mesh in found if mesh.axes.get_title().startswith("MoE layer")]


def test_the_picture_is_a_png_of_the_stated_size_and_replaces_an_older_one(tmp_path):
    from PIL import Image

    workdir = write_run(tmp_path / "run", rows())
    (tmp_path / "run" / "summary.png").write_text("old")
    write_summary_png(workdir)
    with Image.open(tmp_path / "run" / "summary.png") as image:
        assert image.size == (1320, 880)
        assert len(set(image.convert("L").tobytes())) > 50  # not a blank page
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "metrics.jsonl", "summary.png"}


def test_the_title_names_run_gate_mesh_and_final_held_out_loss(tmp_path):
    shown = texts(summary_figure(write_run(tmp_path / "my_$run$", rows())))
    for fact in ("my_\\$run\\$", "gate mixtral", "mesh data=2 x expert=4", "held-out loss 1.2346"):
        assert fact in shown
    assert "bigram 2.500" in shown and "trigram 2.000" in shown
    assert "leaks" not in shown


def test_a_leak_is_marked_in_the_title(tmp_path):
    shown = texts(summary_figure(write_run(tmp_path / "run", rows(leak="eval:future"))))
    assert "leaks: eval:future" in shown


def test_every_moe_layer_shows_its_load_over_the_mean(tmp_path):
    first, second = heatmaps(summary_figure(write_run(tmp_path / "run", rows())))
    assert first.shape == (3, 10)  # experts x logged steps
    np.testing.assert_allclose(first[:, 4], [1.0, 0.5, 1.5])
    np.testing.assert_allclose(second[:2, 4], [1.0, 2.0])
    assert np.ma.getmaskarray(second)[2].all(), "an expert without tokens is off the colour scale"


def test_long_runs_are_averaged_and_deep_models_show_fewer_layers(tmp_path):
    many = rows(1000)
    for row in many:
        row["moe/load"] = [[20, 10, 30]] * 24
    panels = heatmaps(summary_figure(write_run(tmp_path / "run", many)))
    assert len(panels) == 8
    assert panels[0].shape == (3, 240)
    np.testing.assert_allclose(panels[0].T, np.tile([1.0, 0.5, 1.5], (240, 1)))


def test_a_model_without_experts_shows_its_optimisation_instead(tmp_path):
    figure = summary_figure(write_run(tmp_path / "run", rows(), moe=False))
    shown = texts(figure)
    assert "dense_ffn" in shown and "Gradient norm" in shown
    assert "mixtral" not in shown and "Dropped" not in shown
    assert not heatmaps(figure)


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    few = rows(3)[:3]
    few[0]["loss"], few[1]["loss"] = "NaN", "Infinity"
    write_summary_png(write_run(tmp_path / "run", few))


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    write_summary_png(write_run(tmp_path / "run", rows(1)[:1]))


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        write_summary_png(str(tmp_path))
    with pytest.raises(UserError, match="no training step yet"):
        write_summary_png(write_run(tmp_path / "run", []))
