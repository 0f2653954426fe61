"""Digits with captions: what batches hold, and that they are a function of the step."""

from typing import Any

import numpy as np
import pytest

from moejax.contrib.multimodal.source import BYTES, CLASSES, TEMPLATES, PairSource
from moejax.errors import UserError
from moejax.tasks.images.dataset import load_images

B = 16
DIGITS = load_images()


def source(seed=0, batch_size=B, caption_length=26, patch_size=2, eval_rows=40) -> PairSource:
    return PairSource(DIGITS, patch_size, caption_length, batch_size, seed, eval_rows)


def captions(batch) -> list[str]:
    return [
        bytes(text[valid].tolist()).decode()
        for text, valid in zip(batch["text"], batch["text_valid"], strict=True)
    ]


def test_every_caption_names_the_digit_of_its_image():
    """Images are identified by their pixels: those of a class are scikit-learn's of that class."""
    from sklearn import datasets

    raw: Any = datasets.load_digits()
    label_of = {image.tobytes(): label for image, label in zip(raw.images, raw.target, strict=True)}
    for batch in (source().train_batch(3), *source().eval_batches(B, 40)[:2]):
        scaled = batch["image"][..., 0] * DIGITS.std_C + DIGITS.mean_C
        pixels = np.round(16 * scaled).astype(np.float64)
        for image, label, caption in zip(pixels, batch["label"], captions(batch), strict=True):
            assert label_of[image.tobytes()] == label
            assert caption in {template.format(CLASSES[label]) for template in TEMPLATES}


def test_batches_are_a_function_of_seed_and_step():
    first, again = source(), source()
    for step in (5, 0, 200):
        for name, x in first.train_batch(step).items():
            np.testing.assert_array_equal(x, again.train_batch(step)[name])
    one, other = first.train_batch(5), source(seed=1).train_batch(5)
    assert (one["label"] != other["label"]).any() and captions(one) != captions(other)
    assert first.fingerprint == source(seed=1).fingerprint
    assert {name: (x.shape, x.dtype) for name, x in one.items()} == {
        name: (x.shape, x.dtype) for name, x in first.shapes(B).items()
    }


def test_an_epoch_has_every_image_once_and_epochs_differ():
    images = len(DIGITS.train_label_N)
    whole = source(batch_size=images)
    first, second = whole.train_batch(0), whole.train_batch(1)
    assert (first["image"] != second["image"]).any()
    assert sorted(x.tobytes() for x in first["image"]) == sorted(
        x.tobytes() for x in second["image"]
    )
    assert set(np.unique(first["row"])) == set(range(images))
    drawn = {caption.replace(CLASSES[label], "{}") for caption, label in zip(
        captions(first), first["label"], strict=True
    )}  # fmt: skip
    assert drawn == set(TEMPLATES)


def test_evaluation_fills_its_last_batch_with_rows_that_are_not_valid():
    batches = source().eval_batches(B, 40)
    assert [int(batch["valid"].sum()) for batch in batches] == [16, 16, 8]
    np.testing.assert_array_equal(np.concatenate([b["row"] for b in batches]), np.arange(48))
    assert not batches[-1]["text_valid"][8:].any()
    assert len(source().eval_batches(B, 10_000)) == -(-len(DIGITS.heldout_label_N) // B)


def test_the_probe_has_modality_patch_and_byte_of_every_token():
    own, batch = source(), source().eval_batches(B, 40)[-1]
    told = own.probe_arrays(batch, 40)
    assert own.length == 26 and told["token"].shape == told["label"].shape == (B, 52)
    np.testing.assert_array_equal(told["valid"][:8, :26].sum(axis=1), 16)
    np.testing.assert_array_equal(told["valid"][:8, 26:], batch["text_valid"][:8])
    assert not told["valid"][8:].any()
    token, valid, label = (told[name][0] for name in ("token", "valid", "label"))
    text = [told["token_text"][i] for i in token[valid]]
    assert text[:2] == ["patch 0,0", "patch 0,1"] and "".join(text[16:]) == captions(batch)[0]
    assert [told["label_names"][i] for i in label[valid]] == ["image"] * 16 + ["text"] * len(
        captions(batch)[0]
    )
    np.testing.assert_array_equal(told["target"][0, :15], token[1:16])
    assert told["target"][0, 15] == 0, "nothing follows the last patch"


def test_token_counts_count_all_captions_of_all_images():
    own = source(batch_size=len(DIGITS.train_label_N))
    counts = own.token_counts(BYTES + own.patches)
    text = "".join(
        template.format(CLASSES[label]) for label in DIGITS.train_label_N for template in TEMPLATES
    )
    for letter in "aegz ,":
        assert counts[ord(letter)] == text.count(letter) > 0
    assert (counts[BYTES:] == len(TEMPLATES) * len(DIGITS.train_label_N)).all()


def test_a_caption_that_does_not_fit_is_refused_in_one_line():
    with pytest.raises(UserError, match="task.caption_length=25.*'a photo of the digit .*26"):
        source(caption_length=25).train_batch(0)
