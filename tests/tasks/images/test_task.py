"""The task "images": it learns, resumes bit-equal, is the same on every mesh, and refuses what it
cannot read."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from moejax.config import load
from moejax.train import setup
from tests import meshes
from tests.tasks.images import formats
from tests.train import runs, sharing
from tests.train.runs import ROOT, call, call_as_a_user, refused

PAGE = f"{ROOT}/configs/vit.py:size=debug"
STEPS, BREAK = 24, 15
TINY = {
    "model.d_model": 16,
    "model.d_ff": 32,
    "moe.d_ff": 16,
    "train.batch_size": 32,
    "train.steps": STEPS,
    "train.log_every": 6,
    "train.eval_every": 12,
    "train.checkpoint_every": 10,
    "optim.schedule": "constant",
    "report.probe_rows": 8,
}


def flags(**changes) -> list[str]:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config.{name}={value}" for name, value in {**TINY, **changes}.items()]


def command(workdir: Path, **changes) -> list[str]:
    return ["train", f"--config={PAGE}", *flags(**changes), f"--workdir={workdir}"]


def prepared(page: str = PAGE, **changes) -> setup.Run:
    return setup.prepare(load(page, flags(**changes)).config)


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    """A run left alone, and a copy of its files before one of its updates. Its gate draws noise by
    the step and remembers every step before."""
    folder = tmp_path_factory.mktemp("digits")
    workdir, broken = folder / "run", folder / "broken"
    gate = {"moe__gate__name": "tests.train.runs:Drifting"}

    def before(step):
        if step == BREAK:
            runs.snapshot(workdir, broken)

    with sharing.sharing() as shared:
        with shared.steps(before=before):
            ended = call(command(workdir, **gate))
        assert (ended.status, ended.err) == (0, "")
        yield workdir, broken, gate, prepared(**gate)


@pytest.mark.slow
def test_a_run_learns_and_reports_in_units_of_images(drill):
    workdir = drill[0]
    first, last = runs.rows(workdir, "eval")
    # Chance is 0.1 and 2.30 nats.
    assert first["loss"] > last["loss"] and last["accuracy"] > 0.3 and last["loss"] < 2.1
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["units"] == {
        "item": "image", "loss": "nats/image", "tokens_per_row": 16, "items_per_row": 1,
    }  # fmt: skip
    assert saved["baselines"] == {"class prior": pytest.approx(np.log(10), abs=0.01)}
    timing = json.loads((workdir / "timings.jsonl").read_text().splitlines()[-1])
    assert timing["images_per_second"] > 0


@pytest.mark.slow
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(drill, tmp_path):
    workdir, broken, gate, run = drill
    again = runs.copy(broken, tmp_path / "run")
    assert runs.steps(again) == [10]
    ended = call(command(again, **gate))
    assert ended.status == 0 and f"resuming {again} at step 10" in ended.out
    runs.same_run(again, workdir, run)


@pytest.mark.slow
def test_eval_prints_the_held_out_row_and_report_and_picture_name_images(drill, tmp_path):
    workdir = drill[0]
    ended = call(["eval", f"--workdir={workdir}"])
    assert ended.status == 0
    assert json.loads(ended.out.splitlines()[-1]) == runs.rows(workdir, "eval")[-1]
    report = tmp_path / "report.html"
    assert call(["report", str(workdir), f"--output={report}"]).status == 0
    text = report.read_text()
    last = runs.rows(workdir, "eval")[-1]
    for part in (
        f"Held-out loss {last['loss']:.4f} nats/image at step {STEPS}",
        f"{last['accuracy']:.2%} of images are predicted right",
        f"{STEPS} of {STEPS} steps of 32 images: 768 images",
        "images per second",
        "label and expert, layer",
        "row\N{NO-BREAK SPACE}1,\N{NO-BREAK SPACE}column\N{NO-BREAK SPACE}2",
    ):
        assert part in text, part
    for part in ("nats/token", "per byte", "next token", "n-gram", "Not everything could be read"):
        assert part not in text, part
    figure = summary_text(workdir)
    assert any(
        f"{last['loss']:.4f} nats/image, accuracy {last['accuracy']:.2%}" in t for t in figure
    )
    assert "nats/image" in figure and not any("token" in text for text in figure)


def summary_text(workdir: Path) -> list[str]:
    from matplotlib.text import Text

    from moejax.train.workdir.summary import summary_figure

    return [text.get_text() for text in summary_figure(str(workdir)).findobj(Text)]


# Meshes and gates.


def steps_of(shape, page=PAGE, steps=3, **changes):
    """Losses, loads and drops of the first steps on a mesh, and the held-out loss after them."""
    axes = {f"mesh__{axis}": size for axis, size in shape.items()}
    run = prepared(page, **axes, **changes)
    with jax.set_mesh(run.mesh):
        state, found = run.init_state(), []
        for step in range(steps):
            state, metrics = run.train_step(state, run.put(run.data.train_batch(step)))
            found.append(jax.device_get(metrics["totals"]))
        totals = jax.device_get(run.evaluate(state, map(run.put, run.eval_batches())))
    loss = np.array([t.loss / t.items for t in found])
    held_out = sum(t.loss for t in totals) / sum(t.items for t in totals)
    counts = np.array([[t.stats.load_E, t.stats.dropped_E] for t in found])
    return loss, held_out, counts, sum(int(t.items) for t in totals)


IN_FOURS: dict[str, Any] = {"moe__priority": "gate", "moe__group": "4"}
"""Eight groups in a batch of 32: one for each of eight devices."""


@pytest.fixture(scope="module")
def alone():
    return steps_of({"data": 1}, **IN_FOURS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "expert": 2},
        {"expert": 8},
    ],
    ids=meshes.name,
)
def test_every_mesh_trains_the_same(shape, alone):
    loss, held_out, counts, items = steps_of(shape, **IN_FOURS)
    # float32 sums in another order, over three steps.
    np.testing.assert_allclose(loss, alone[0], atol=1e-5)
    np.testing.assert_allclose(held_out, alone[1], atol=1e-5)
    np.testing.assert_array_equal(counts, alone[2])
    assert counts[:, 1].sum() > 0, "capacity must bind"
    assert items == alone[3] == 359


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    ["priority=gate", "gate=expert_choice", "gate=sbase", "gate=soft"],
)
def test_gates_that_route_by_the_whole_image_train(arguments):
    loss, held_out, _, _ = steps_of({"data": 1}, f"{PAGE},{arguments}", 30)
    assert loss[0] > 2.0 and held_out < 1.6


@pytest.mark.slow
def test_the_page_reaches_98_percent(tmp_path):
    ended = call_as_a_user([
        "train", f"--config={ROOT}/configs/vit.py", f"--workdir={tmp_path / 'run'}"
    ])  # fmt: skip
    assert ended.status == 0, ended.err
    row = runs.rows(tmp_path / "run", "eval")[-1]
    assert row["accuracy"] >= 0.98  # what was asked of this page; docs/images.md has other seeds


# Other formats.


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "tar", "idx", "cifar10", "cifar100"])
def test_a_run_on_every_format_equals_one_on_the_same_pictures_in_folders(tmp_path, form):
    shape = {"idx": (9, 7), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}.get(form, (8, 8, 3))
    names = "012" if form in ("idx", "tar") else formats.NAMES
    sides = formats.make(0, shape, (5, 5, 5)), formats.make(1, shape, (3, 3, 3))
    for side, pictures in zip(("train", "test"), sides, strict=True):
        formats.save_folder(tmp_path / "folder" / side, pictures, names)
        if form == "parquet":
            formats.save_parquet(tmp_path / form / f"{side}-00000-of-00001.parquet", pictures)
        elif form == "tar":
            formats.save_tars(tmp_path / form, pictures, side)
        elif form == "idx":
            formats.save_idx(tmp_path / form, {"test": "t10k"}.get(side, side), pictures, True)
    if form.startswith("cifar"):
        getattr(formats, f"save_{form}")(tmp_path / form, *sides)
    found = []
    for path in (form, "folder"):
        workdir = tmp_path / "runs" / path
        argv = command(
            workdir, data__path=tmp_path / path, train__steps=3, train__log_every=1,
            train__eval_every=3, train__batch_size=8, report__probe_rows=2,
        )  # fmt: skip
        ended = call(argv)
        assert ended.status == 0, ended.err
        assert ("\nformat " in ended.out) == (path == form)
        found.append([(r["step"], r["split"], r["loss"]) for r in runs.rows(workdir)])
    assert found[0] == found[1] and len(found[0]) >= 4


# What is refused.


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for seed, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / "0.png")
    return root


@pytest.mark.parametrize("size", ["digits", "debug", "photos"])
def test_the_page_cuts_images_into_segments_for_lory(size):
    page = load(f"{ROOT}/configs/vit.py:gate=lory,size={size}").config
    task, gate = page.task, page.moe.gate
    assert gate.segment * gate.segment == (task.image_size // task.patch_size) ** 2


def test_the_router_of_lory_is_trained_on_the_unchanged_page():
    setup.prepare(load(f"{ROOT}/configs/vit.py:gate=lory").config).check_gate_data(train_steps=1)


def test_bad_images_are_reported_in_one_line_and_nothing_is_written(pictures, tmp_path):
    argv = command(tmp_path / "run", data__path=pictures)
    damaged = pictures / "val" / "dog" / "0.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    refused(argv, str(damaged), "is not a readable image")
    damaged.write_bytes(whole)
    (pictures / "train" / "eel").mkdir()
    (pictures / "train" / "eel" / "0.png").write_bytes(whole)
    refused(argv, "data.path: class 'eel' is in", "but not in")
    refused(command(tmp_path / "run", task__patch_size=3), "task.image_size=8 is not a multiple of")
    refused(command(tmp_path / "run", task__channels=3), "the built-in digits are 8 x 8 and grey")
    refused(command(tmp_path / "run", data__eval_fraction=1.5), "data.eval_fraction=1.5 must be")
    refused(command(tmp_path / "run", train__seq_len=3), "train.seq_len")
    refused([*command(tmp_path / "run"), "--config.moe.allow_future_leak=True"], "allow_future")
    assert not (tmp_path / "run").exists()


def test_files_of_images_are_refused_in_one_line_and_nothing_is_written(tmp_path):
    argv = command(tmp_path / "run", data__path=tmp_path / "data")
    sides = formats.make(0, (8, 8)), formats.make(1, (8, 8), (2, 2, 2))
    for side, pictures in zip(("train", "t10k"), sides, strict=True):
        formats.save_idx(tmp_path / "data", side, pictures)
    cut = tmp_path / "data" / "t10k-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:-1])
    refused(argv, str(cut), "it is truncated")
    formats.save_parquet(tmp_path / "data" / "a.parquet", sides[0])
    refused(argv, "is Parquet, and", "IDX; name the files of one format")
    assert not (tmp_path / "run").exists()


def test_changed_images_are_refused_when_a_run_resumes(pictures):
    first = prepared(data__path=pictures).data.fingerprint
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(pictures / "train" / "cat" / "0.png")
    assert prepared(data__path=pictures).data.fingerprint != first


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    refused(command(tmp_path / "run"), "scikit-learn; pip install 'moejax[vision]'")
    assert not (tmp_path / "run").exists()
