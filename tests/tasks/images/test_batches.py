"""Batches of images: every image once an epoch, functions of the step, shifts, evaluation."""

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.tasks.images.dataset import Images, load_images
from moejax.tasks.images.source import (
    ImageSource,
    image_eval_batches,
    image_train_batches,
    shifted,
)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images()


def rows_of(images, batch):
    """The indices of these training images; the digits are all different."""
    index = {image.tobytes(): i for i, image in enumerate(images.normalise(images.train_NHWC))}
    assert len(index) == len(images.train_NHWC)
    return [index[image.tobytes()] for image in batch["image"]]


def test_a_batch_has_the_contracts_shapes_and_types(digits):
    batch = image_train_batches(digits, batch_size=4, seed=3).batch(2)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((4, 8, 8, 1), "float32"),
        "label": ((4,), "int32"),
        "valid": ((4,), "bool"),
        "row": ((4,), "int32"),
    }
    assert batch["valid"].all() and batch["row"].tolist() == [8, 9, 10, 11]


def test_every_epoch_has_every_image_once_with_its_label_in_another_order(digits):
    batches = image_train_batches(digits, batch_size=719, seed=3)  # half of the images
    epochs = []
    for epoch in range(2):
        halves = [batches.batch(2 * epoch + half) for half in range(2)]
        rows = np.concatenate([rows_of(digits, half) for half in halves])
        np.testing.assert_array_equal(np.sort(rows), np.arange(1438))
        labels = np.concatenate([half["label"] for half in halves])
        np.testing.assert_array_equal(labels, digits.train_label_N[rows])
        epochs.append(rows.tolist())
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone(digits):
    batches = image_train_batches(digits, 8, 3)
    forward = [batches.batch(step) for step in range(4)]
    again = image_train_batches(digits, 8, 3)
    for step in (3, 0, 2):
        for name, values in forward[step].items():
            np.testing.assert_array_equal(again.batch(step)[name], values)
    other = image_train_batches(digits, 8, 4).batch(0)
    assert (other["image"] != forward[0]["image"]).any()


def test_a_shift_moves_each_image_independently_and_fills_with_black(digits):
    pixels = digits.train_NHWC[:25]
    moves = np.array([(down, right) for down in range(-2, 3) for right in range(-2, 3)])
    for image, moved, (down, right) in zip(pixels, shifted(pixels, moves), moves, strict=True):
        for i in range(8):
            for j in range(8):
                inside = 0 <= i - down < 8 and 0 <= j - right < 8
                assert moved[i, j] == (image[i - down, j - right] if inside else 0)
    plain, once, again, later = (
        image_train_batches(digits, 200, 0, shift).batch(step)
        for shift, step in ((0, 1), (1, 1), (1, 1), (1, 2))
    )
    np.testing.assert_array_equal(plain["label"], once["label"])
    np.testing.assert_array_equal(once["image"], again["image"])
    assert (once["image"] != later["image"]).any()
    kept = (plain["image"] == once["image"]).all(axis=(1, 2, 3)).mean()
    # Half of the moves along an axis are none: 0.25 +- 0.031 of 200 images; bounds at 3 deviations.
    assert 0.16 < kept < 0.34


@pytest.mark.parametrize("shift", [0, 2])
def test_a_hosts_share_is_a_slice_of_the_global_batch(digits, shift):
    batches = image_train_batches(digits, 8, 3, shift)
    whole = batches.batch(5)
    for rows in (slice(2, 6), slice(0, 0)):
        for name, values in batches.batch(5, rows).items():
            np.testing.assert_array_equal(values, whole[name][rows])


@pytest.mark.parametrize("rows", [359, 10**6, 100])
def test_evaluation_covers_the_held_out_side_up_to_the_row_limit(digits, rows):
    batches = image_eval_batches(digits, 64, rows)
    count = min(rows, 359)
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.tolist() == [True] * count + [False] * (64 * len(batches) - count)
    assert {batch["image"].shape for batch in batches} == {(64, 8, 8, 1)}
    images, labels = (np.concatenate([b[k] for b in batches]) for k in ("image", "label"))
    chosen = np.arange(count) * 359 // count
    np.testing.assert_array_equal(labels[:count], digits.heldout_label_N[chosen])
    np.testing.assert_array_equal(images[:count], digits.normalise(digits.heldout_NHWC[chosen]))
    assert not images[count:].any() and not labels[count:].any()
    row = np.concatenate([batch["row"] for batch in batches])
    np.testing.assert_array_equal(row, np.arange(len(row)))


def test_impossible_settings_are_refused(digits):
    for arguments, message in (
        ((0, 0), "train.batch_size: 0"),
        ((4, -1), "train.seed: -1"),
        ((4, 0, 8), r"task.shift: 8 is not in \[0, 8\)"),
    ):
        with pytest.raises(UserError, match=message):
            image_train_batches(digits, *arguments)
    with pytest.raises(UserError, match="train.eval_rows: 0"):
        image_eval_batches(digits, 4, 0)
    with pytest.raises(ValueError, match="step -1"):
        image_train_batches(digits, 4, 0).batch(-1)


@pytest.mark.parametrize("rows", [3, 1000])
def test_the_class_prior_is_computed_on_the_evaluated_images(digits, rows):
    source = ImageSource(digits, 2, 8, 0, rows)
    labels = [b["label"][b["valid"]] for b in source.eval_batches(8, rows)]
    chance = np.bincount(digits.train_label_N, minlength=10) / len(digits.train_label_N)
    expected = -np.mean(np.log(chance[np.concatenate(labels)]))
    assert source.baselines() == {"class prior": pytest.approx(expected, rel=1e-12)}
