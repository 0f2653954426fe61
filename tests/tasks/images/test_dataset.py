"""Images: the built-in digits, folders of images, and refused inputs."""

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from moejax.data.split import EVAL_FOLDERS
from moejax.errors import UserError
from moejax.tasks.images.dataset import SIDES, Images, load_images, read_image, split_classes


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(seed, height=6, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 4, 5 and 6 pictures."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog", "eel")):
        for i in range(4 + label):
            save(root / name / f"{i}.png", picture(10 * label + i))
    return root


def as_set(*sides):
    pairs = (pair for side in sides for pair in zip(*side, strict=True))
    return sorted((int(label), image.tobytes()) for image, label in pairs)


# The digits.


def test_the_digits_equal_scikit_learns_and_each_is_on_one_side(digits):
    raw: Any = load_digits()
    whole = as_set((raw.images.astype(np.uint8), raw.target))
    sides = [
        (digits.train_NHWC, digits.train_label_N),
        (digits.heldout_NHWC, digits.heldout_label_N),
    ]
    assert as_set(*sides) == whole
    assert digits.classes == tuple("0123456789") and digits.name == "digits"
    assert digits.train_NHWC.shape == (1438, 8, 8, 1) and digits.heldout_NHWC.shape[0] == 359


def test_the_split_holds_out_the_same_share_of_every_class(digits):
    train, heldout = (
        np.bincount(side, minlength=10) for side in (digits.train_label_N, digits.heldout_label_N)
    )
    np.testing.assert_array_equal(heldout, np.round(0.2 * (train + heldout)))


def test_pixels_are_normalised_by_the_training_side_alone(digits):
    scaled = digits.train_NHWC / 16.0
    assert scaled.min() == 0.0 and scaled.max() == 1.0
    # float32 sums of 92,032 values.
    np.testing.assert_allclose(digits.mean_C[0], scaled.mean(), rtol=1e-6)
    np.testing.assert_allclose(digits.std_C[0], scaled.std(), rtol=1e-6)
    expected = (digits.heldout_NHWC / 16.0 - scaled.mean()) / scaled.std()
    np.testing.assert_allclose(digits.normalise(digits.heldout_NHWC), expected, atol=1e-5)


@pytest.mark.parametrize("change", [{"image_size": 16}, {"channels": 3}])
def test_digits_of_another_size_are_refused(change):
    with pytest.raises(UserError, match="task.image_size, task.channels: the built-in digits are"):
        load_images(**change)


@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), share=st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_every_class_is_on_both_sides_of_any_split(counts, share):
    label_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    train, heldout = split_classes(label_N, tuple("abcde"[: len(counts)]), share)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train, heldout])), np.arange(len(label_N))
    )
    for label, count in enumerate(counts):
        held = int((label_N[heldout] == label).sum())
        assert 1 <= held <= count - 1
        assert abs(held - share * count) <= 0.5 or held in (1, count - 1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(UserError, match=f"data.eval_fraction: {share} is not between 0 and 1"):
        load_images(eval_fraction=share)


# Folders.


def test_pixels_equal_those_of_pillow(folder):
    for mode, channels in (("RGB", 3), ("L", 1)):
        images = load_images(str(folder), 6, channels, 0.34)
        expected = []
        for label, name in enumerate(("cat", "dog", "eel")):
            for path in (folder / name).iterdir():
                pixels = np.asarray(Image.open(path).convert(mode)).reshape(6, 6, channels)
                expected.append((label, pixels.tobytes()))
        sides = (
            (images.train_NHWC, images.train_label_N),
            (
                images.heldout_NHWC,
                images.heldout_label_N,
            ),
        )
        assert as_set(*sides) == sorted(expected)
        assert images.classes == ("cat", "dog", "eel") and images.name == "pets"
        assert np.bincount(images.heldout_label_N).tolist() == [1, 2, 2]


def test_the_middle_square_is_averaged_down(tmp_path):
    """A bilinear filter as wide as a target pixel keeps what is constant over its support."""
    wide = np.full((8, 24), 200, np.uint8)
    wide[:, 8:16] = 40
    save(tmp_path / "wide.png", wide)
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "wide.png"), 2, 1), np.full((2, 2, 1), 40)
    )
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    save(tmp_path / "stripes.png", stripes)
    small = read_image(str(tmp_path / "stripes.png"), 4, 1)
    # Without antialiasing every pixel would be 0 or 255. The mean is 127.5, and half of the largest
    # weight of one of the 32 pixels under the filter, 255 / 32, what an odd one adds.
    assert np.abs(small - 127.5).max() <= 255 / 32
    assert read_image(str(tmp_path / "stripes.png"), 4, 3).shape == (4, 4, 3)


def test_a_photograph_is_rotated_by_its_exif_orientation(tmp_path):
    pixels, exif = picture(1), Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned, show it a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_image(str(tmp_path / "turned.png"), 6, 3)
    np.testing.assert_array_equal(read, np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "bmp", "gif", "webp", "PNG"])
def test_every_image_format_is_found_and_read(folder, suffix):
    Image.fromarray(np.full((6, 6), 77, np.uint8)).save(folder / "cat" / f"x.{suffix}")
    before = len(load_images(str(folder), 6, 1).train_label_N)
    assert before == 12 + 1  # of 5 cats, 5 dogs and 6 eels one each is held out
    # Lossy formats keep a constant picture to within a few levels.
    assert np.abs(read_image(str(folder / "cat" / f"x.{suffix}"), 6, 1).astype(int) - 77).max() < 4


def test_hidden_and_other_files_are_ignored_and_deeper_folders_are_read(folder):
    first = load_images(str(folder), 6, 3).fingerprint
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / ".cache").mkdir()
    save(folder / ".cache" / "0.png", picture(1))
    (folder / "cat" / "._0.png").write_bytes(b"resource fork")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "README.md").write_text("not an image")
    assert load_images(str(folder), 6, 3).fingerprint == first
    save(folder / "cat" / "more" / "9.png", picture(99))
    assert load_images(str(folder), 6, 3).fingerprint != first


def test_the_fingerprint_covers_pixels_labels_and_split(folder):
    first = load_images(str(folder), 6, 3)
    moved = folder.rename(folder.parent / "moved")
    assert load_images(str(moved), 6, 3).fingerprint == first.fingerprint
    assert load_images(str(moved), 6, 3, 0.4).fingerprint != first.fingerprint
    assert load_images(str(moved), 6, 1).fingerprint != first.fingerprint
    (moved / "cat" / "0.png").rename(moved / "dog" / "9.png")
    assert load_images(str(moved), 6, 3).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "others, chosen",
    [
        *(([name], name) for name in EVAL_FOLDERS),
        (["val", "test"], "val"),
        (["test", "validation"], "validation"),
    ],
)
def test_a_folder_may_have_its_own_split(tmp_path, others, chosen):
    for seed, side in enumerate(["train", *others]):
        for label, name in enumerate("ab"):
            save(tmp_path / side / name / "0.png", picture(10 * seed + label))
    images = load_images(str(tmp_path), 6, 3)
    seed = 1 + others.index(chosen)
    for side, base in ((images.train_NHWC, 0), (images.heldout_NHWC, 10 * seed)):
        np.testing.assert_array_equal(side, np.stack([picture(base), picture(base + 1)]))
    assert images.train_label_N.tolist() == images.heldout_label_N.tolist() == [0, 1]


def refused(path, **changes):
    with pytest.raises(UserError) as caught:
        load_images(str(path), **{"image_size": 6, "channels": 3, **changes})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_damaged_image_is_named(folder):
    whole = (folder / "dog" / "1.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", whole[:40] + b"\0" * 40 + whole[80:]):
        (folder / "dog" / "1.png").write_bytes(content)
        message = refused(folder)
        assert str(folder / "dog" / "1.png") in message and "not a readable image" in message


def test_deep_pixels_are_refused_rather_than_clipped(folder):
    Image.fromarray(np.full((6, 6), 300, np.uint16)).save(folder / "dog" / "1.png")
    message = refused(folder)
    assert str(folder / "dog" / "1.png") in message and "more than 8 bits" in message


def test_a_class_on_one_side_only_is_named(tmp_path):
    for side, names in (("train", "abc"), ("val", "ab")):
        for name in names:
            save(tmp_path / side / name / "0.png", picture(0))
    message = refused(tmp_path)
    assert "class 'c' is in" in message and f"not in '{tmp_path / 'val'}'" in message
    (tmp_path / "train" / "c").rename(tmp_path / "val" / "d")
    assert f"class 'd' is in '{tmp_path / 'val'}'" in refused(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train", "holdout"],
        ["training", "validation"],
        ["Train", "Val"],
        ["test", "train2"],
        ["bus", "train", "car"],
    ],
)
def test_a_side_of_a_split_is_not_mistaken_for_a_class(tmp_path, names):
    for name in names:
        for seed, inner in enumerate("ab"):
            save(tmp_path / name / inner / "0.png", picture(seed))
    message = refused(tmp_path)
    for name in names:
        assert (repr(name) in message) == (name.lower() in SIDES)
    assert "'train' and 'val'" in message and "rename a class" in message


def test_a_class_may_be_called_train_inside_a_split(tmp_path):
    for side in ("train", "dev"):
        for seed, name in enumerate(("bus", "train")):
            save(tmp_path / side / name / "0.png", picture(seed))
    assert load_images(str(tmp_path), 6, 3).classes == ("bus", "train")


def test_a_folder_without_classes_or_images_is_refused(tmp_path, folder):
    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert "is not a folder" in refused(folder / "cat" / "0.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at least 2 classes, found none" in refused(empty)
    (empty / "only").mkdir()
    assert "at least 2 classes, found 'only'" in refused(empty)
    (empty / "second").mkdir()
    assert "class 'only' has no images" in refused(empty)


def test_an_image_beside_the_classes_and_a_class_of_one_are_refused(folder):
    save(folder / "stray.png", picture(0))
    assert "stray.png' is in no class" in refused(folder)
    (folder / "stray.png").unlink()
    for i in range(1, 4):
        (folder / "cat" / f"{i}.png").unlink()
    assert "class 'cat' has 1 image, too few to hold one out" in refused(folder)


def test_other_channels_and_sizes_are_refused(folder):
    assert "task.channels: 2 is neither 1 (grey) nor 3 (RGB)" in refused(folder, channels=2)
    assert "task.image_size: 0 must be at least 1" in refused(folder, image_size=0)


@pytest.mark.parametrize("module, package", [("PIL", "pillow"), ("sklearn", "scikit-learn")])
def test_a_missing_package_names_the_extra(folder, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(folder) if module == "PIL" else refused("", image_size=8, channels=1)
    assert f"needs the package {package}; pip install 'moejax[vision]'" in message
