"""Parquet, WebDataset, MNIST's and CIFAR's files: equal to the same pictures in a folder."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moejax.errors import UserError
from moejax.tasks.images.dataset import Images, load_images
from moejax.tasks.images.formats.files import side_of
from tests.tasks.images.formats import (
    NAMES,
    idx,
    make,
    png,
    save_cifar10,
    save_cifar100,
    save_folder,
    save_idx,
    save_parquet,
    save_tars,
    write_tar,
)  # fmt: skip


def same(first: Images, second: Images):
    for field in ("train_NHWC", "train_label_N", "heldout_NHWC", "heldout_label_N"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    assert first.classes == second.classes and first.fingerprint == second.fingerprint


def refused(path, *parts, **changes) -> None:
    with pytest.raises(UserError) as caught:
        load_images(str(path), **{"image_size": 6, "channels": 3, **changes})
    message = str(caught.value)
    assert "\n" not in message and message.startswith("data.path: "), message
    for part in parts:
        assert str(part) in message, message


# Equal to a folder.


TRAIN, TEST = make(0, (6, 8, 3)), make(1, (6, 8, 3), (2, 2, 2))


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory) -> Path:
    """The pictures of both sides as PNG files in folders."""
    root = tmp_path_factory.mktemp("folders")
    save_folder(root / "train", TRAIN)
    save_folder(root / "test", TEST)
    return root


SIZES = [{"image_size": 6, "channels": 3}, {"image_size": 4, "channels": 1}]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plain", [False, True])
def test_parquet_equals_the_same_pictures_in_folders(two_sides, tmp_path, size, plain):
    save_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", TRAIN[:7], plain=plain)
    save_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", TRAIN[7:], plain=plain)
    save_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", TEST, plain=plain)
    (tmp_path / "README.md").write_text("a card")
    images = load_images(str(tmp_path), **size)
    same(images, load_images(str(two_sides), **size))
    assert images.source == "Parquet, 3 files"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("label", ["cls", "json"])
def test_tar_shards_equal_the_same_pictures_in_folders(two_sides, tmp_path, size, label):
    save_tars(tmp_path / "a", TRAIN, "imagenet-train", label)
    save_tars(tmp_path / "a", TEST, "imagenet-test", label)
    images = load_images(str(tmp_path), **size)
    folders = load_images(str(two_sides), **size)
    assert images.classes == ("0", "1", "2")  # .cls has numbers only
    assert images.fingerprint == folders.fingerprint
    assert images.source == "WebDataset, 6 files"


def test_sides_of_shards_may_be_folders_and_a_compressed_shard_is_the_same(two_sides, tmp_path):
    save_tars(tmp_path / "train", TRAIN, "shard")
    save_tars(tmp_path / "val", TEST, "shard")
    first = load_images(str(tmp_path), 6, 3)
    assert first.fingerprint == load_images(str(two_sides), 6, 3).fingerprint
    for path in tmp_path.rglob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    same(load_images(str(tmp_path), 6, 3), first)


GREY = make(2, (9, 7), (4, 5, 6)), make(3, (9, 7), (2, 2, 2))


@pytest.mark.parametrize(
    "size", [{"image_size": 7, "channels": 1}, {"image_size": 9, "channels": 3}]
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_equals_the_same_pictures_in_folders(tmp_path, size, packed):
    for side, name, pictures in zip(("train", "val"), ("train", "t10k"), GREY, strict=True):
        save_folder(tmp_path / "folder" / side, pictures, "012")
        save_idx(tmp_path / "mnist" / "raw", name, pictures, packed)
    images = load_images(str(tmp_path / "mnist"), **size)
    same(images, load_images(str(tmp_path / "folder"), **size))
    assert images.source == "IDX, 2 files"
    if packed:  # as torchvision leaves both behind
        for side, pictures in zip(("train", "t10k"), GREY, strict=True):
            save_idx(tmp_path / "mnist" / "raw", side, pictures)
        same(load_images(str(tmp_path / "mnist"), **size), images)
        same(load_images(f"{tmp_path}/mnist/raw/*.gz", **size), images)


COLOUR = make(4, (32, 32, 3), (5, 5, 5)), make(5, (32, 32, 3), (2, 2, 2))


@pytest.mark.parametrize(
    "size", [{"image_size": 32, "channels": 3}, {"image_size": 16, "channels": 1}]
)
@pytest.mark.parametrize("save, name", [(save_cifar10, "CIFAR-10"), (save_cifar100, "CIFAR-100")])
def test_cifar_equals_the_same_pictures_in_folders(tmp_path, size, save, name):
    for side, pictures in zip(("train", "test"), COLOUR, strict=True):
        save_folder(tmp_path / "folder" / side, pictures)
    save(tmp_path / "cifar", *COLOUR)
    images = load_images(str(tmp_path / "cifar"), **size)
    same(images, load_images(str(tmp_path / "folder"), **size))
    assert images.source.startswith(f"{name}, ")


def test_pixels_of_the_wanted_size_are_not_resampled(tmp_path):
    save_idx(tmp_path / "mnist", "train", make(0, (28, 28)))
    save_idx(tmp_path / "mnist", "t10k", GREY28 := make(1, (28, 28)))
    images = load_images(str(tmp_path / "mnist"), 28, 1)
    np.testing.assert_array_equal(images.heldout_NHWC[..., 0], np.stack([p for p, _ in GREY28]))
    save_cifar10(tmp_path / "cifar", *COLOUR)
    images = load_images(str(tmp_path / "cifar"), 32, 3)
    np.testing.assert_array_equal(images.train_NHWC, np.stack([p for p, _ in COLOUR[0]]))


def test_without_sides_a_share_of_every_class_is_held_out_as_in_a_folder(tmp_path):
    save_folder(tmp_path / "folder", TRAIN)
    save_parquet(tmp_path / "parquet" / "pets.parquet", TRAIN)
    images = load_images(str(tmp_path / "parquet"), 6, 3, 0.34)
    same(images, load_images(str(tmp_path / "folder"), 6, 3, 0.34))
    assert np.bincount(images.heldout_label_N).tolist() == [1, 2, 2]
    same(load_images(str(tmp_path / "parquet" / "pets.parquet"), 6, 3, 0.34), images)


def test_the_share_held_out_has_its_own_labels(tmp_path):
    """Every picture shows its label; they are mixed, so that the order of files is not that of
    classes."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (4, 5, 6)))
    pictures = [(np.full((6, 6, 3), 40 + label, np.uint8), int(label)) for label in labels]
    save_parquet(tmp_path / "a.parquet", pictures)
    images = load_images(str(tmp_path), 6, 3, 0.34)
    for pixels, label_N in (
        (images.train_NHWC, images.train_label_N),
        (images.heldout_NHWC, images.heldout_label_N),
    ):
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], 40 + label_N)
    assert np.bincount(images.heldout_label_N).tolist() == [1, 2, 2]


def test_globs_and_lists_of_files_are_split_by_names_or_by_a_share(two_sides, tmp_path):
    for i, part in enumerate((TRAIN[:7], TRAIN[7:])):
        save_parquet(tmp_path / f"train-0000{i}-of-00003.parquet", part)
    save_parquet(tmp_path / "test.parquet", TEST)
    train = f"{tmp_path}/train-*.parquet"
    same(load_images(f"{train}, {tmp_path}/test.parquet", 6, 3), load_images(str(two_sides), 6, 3))
    same(load_images(f"{tmp_path}/*.parquet", 6, 3), load_images(str(two_sides), 6, 3))
    same(load_images(train, 6, 3), load_images(str(two_sides / "train"), 6, 3))
    refused(f"{train},{tmp_path}/nothing.parquet", "nothing.parquet' matches no file")
    refused(tmp_path, "belongs to a set without its 'train-00002-of-00003.parquet'; add it")


def test_sides_other_than_train_and_the_first_held_out_one_are_not_read(two_sides, tmp_path):
    save_parquet(tmp_path / "train.parquet", TRAIN)
    save_parquet(tmp_path / "validation.parquet", TEST)
    (tmp_path / "test.parquet").write_bytes(b"is not opened")
    same(load_images(str(tmp_path), 6, 3), load_images(str(two_sides), 6, 3))


def test_classes_of_a_schema_keep_their_numbers_and_may_be_empty(tmp_path):
    pictures = [(pixels, label * 2) for pixels, label in TRAIN]  # classes 0, 2, 4
    save_parquet(tmp_path / "a.parquet", pictures, names="abcdef")
    images = load_images(str(tmp_path), 6, 3)
    assert images.classes == tuple("abcdef")
    assert set(images.train_label_N) == set(images.heldout_label_N) == {0, 2, 4}


def test_numbers_without_names_are_classes_in_the_order_of_their_values(tmp_path):
    pictures = [(pixels, (10, 2, 7)[label]) for pixels, label in GREY[0]]
    save_idx(tmp_path, "train", pictures)
    images = load_images(str(tmp_path / "train-images-idx3-ubyte"), 7, 1)
    assert images.classes == ("2", "7", "10")
    assert np.bincount(images.heldout_label_N).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "image, label", [("image", "label"), ("img", "fine_label"), ("image", "labels"), ("x", "y")]
)
def test_columns_are_found_by_their_names_or_as_datasets_declares_them(tmp_path, image, label):
    save_parquet(tmp_path / "a.parquet", TRAIN, image=image, label=label)
    assert load_images(str(tmp_path), 6, 3).classes == NAMES


# Refused.


def test_a_damaged_picture_is_named_by_its_file_and_number(tmp_path):
    whole = png(TRAIN[8][0])
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        table = {"image": [png(p) for p, _ in TRAIN], "label": [label for _, label in TRAIN]}
        table["image"][8] = content
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        refused(tmp_path / "a.parquet", tmp_path / "a.parquet:9", "not a readable image")
        members = [(f"{i:02}.png", png(p)) for i, (p, _) in enumerate(TRAIN)]
        members[8] = ("08.png", content)
        labels = [(f"{i:02}.cls", str(label).encode()) for i, (_, label) in enumerate(TRAIN)]
        write_tar(tmp_path / "tar" / "a.tar", sorted(members + labels))
        refused(tmp_path / "tar", tmp_path / "tar" / "a.tar:9 (08)", "not a readable image")


def parquet_of(tmp_path, **columns) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path


DATA = [png(pixels) for pixels, _ in TRAIN[:4]]


def test_columns_that_do_not_fit_are_named(tmp_path):
    refused(
        parquet_of(tmp_path, image=DATA, caption=["a"] * 4),
        "no column of labels (label, labels, fine_label), only 'image', 'caption'; rename",
    )
    refused(
        parquet_of(tmp_path, photo=DATA, label=[0, 1, 0, 1]),
        "no column of pictures (image, img), only 'photo', 'label'",
    )
    refused(parquet_of(tmp_path, image=DATA, label=[0.5] * 4), "labels of type double")
    refused(parquet_of(tmp_path, image=DATA, label=[[0]] * 4), "labels of type list<")
    refused(parquet_of(tmp_path, image=["a.png"] * 4, label=[0, 1, 0, 1]), "type string, not the")
    refused(
        parquet_of(tmp_path, image=DATA, label=[0, 1, None, 1]), "a.parquet:3 has no label (column"
    )
    refused(
        parquet_of(tmp_path, image=[*DATA[:3], None], label=[0, 1, 0, 1]),
        "a.parquet:4 has no bytes of a picture in column 'image'",
    )
    refused(parquet_of(tmp_path, image=DATA, label=[0, 1, -1, 1]), "label -1 of", ":3 is negative")
    refused(parquet_of(tmp_path, image=DATA, label=["x"] * 4), "are of class 'x'; at least 2")
    refused(
        parquet_of(tmp_path, image=pa.array([], pa.binary()), label=pa.array([], pa.int8())),
        "holds no pictures",
    )


def test_labels_outside_the_classes_are_named(tmp_path):
    for label in (-1, 3):
        pictures = [*TRAIN[:5], (TRAIN[0][0], label)]
        save_parquet(tmp_path / "p" / "a.parquet", pictures)
        refused(
            tmp_path / "p", f"label {label} of", "a.parquet:6 is not in [0, 3)", "(cat, dog, eel)"
        )
    save_cifar10(tmp_path / "c", [*COLOUR[0][:-1], (COLOUR[0][0][0], 3)], COLOUR[1])
    refused(tmp_path / "c", "label 3 of", "data_batch_5.bin:3 is not in [0, 3)")


def test_words_beside_names_of_classes_are_refused(tmp_path):
    save_parquet(tmp_path / "a.parquet", TRAIN)
    table = pq.read_table(tmp_path / "a.parquet")
    words = pa.array([NAMES[label] for _, label in TRAIN])
    pq.write_table(table.set_column(1, "label", words), tmp_path / "a.parquet")
    assert b"huggingface" in pq.read_schema(tmp_path / "a.parquet").metadata
    refused(tmp_path, "a.parquet:1 is a word, but", "names 3 classes (cat, dog, eel)")


def test_files_with_other_classes_or_kinds_of_labels_are_refused(tmp_path):
    save_parquet(tmp_path / "a.parquet", TRAIN)
    save_parquet(tmp_path / "b.parquet", TRAIN, names=("cat", "dog", "fox"))
    refused(tmp_path, "b.parquet' names 3 classes (cat, dog, fox)", "write them with the same")
    save_parquet(tmp_path / "b.parquet", TRAIN, plain=True)
    refused(tmp_path, "names no classes")
    write_tar(
        tmp_path / "tar" / "a.tar",
        [("a.png", DATA[0]), ("a.cls", b"0"), ("b.png", DATA[1]), ("b.cls", b"dog")],
    )
    refused(tmp_path / "tar", "words at", "a.tar:2 and numbers at", "a.tar:1")


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.png", b"x")], "a.tar:1 (a) has no label (.cls, or .json with 'label'), only .png"),
        ([("a.cls", b"0"), ("b.png", b"x")], "a.tar:1 (a) has no picture"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], "(a) has two pictures"),
        ([("a.png", b"x"), ("a.cls", b" \n")], "the .cls of"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], "the .cls of"),
        ([("a.png", b"x"), ("a.json", b"{")], "the .json of"),
        ([("a.png", b"x"), ("a.json", b'{"class": 1}')], "KeyError"),
        ([("a.png", b"x"), ("a.json", b"[1]")], "an object with the field 'label'"),
        ([("a.png", b"x"), ("a.json", b'{"label": null}')], "(None)"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "(True)"),
        ([("a.png", b"x"), ("a.json", b'{"label": 1.5}')], "(1.5)"),
        ([("a.png", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "two members .png"),
        ([("a.png", b"x"), ("b.png", b"x"), ("a.cls", b"0")], "a.tar:1 (a) has no label"),
        ([("data_batch_1.bin", b"x")], "has no picture"),
        ([("a.png", None)], "'a.png' in"),
        ([], "holds no pictures"),
    ],
)
def test_a_sample_without_one_picture_and_one_label_is_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    refused(tmp_path, message)


def test_an_archive_of_other_members_is_read_around_them(two_sides, tmp_path):
    members: list[tuple[str, bytes]] = [
        ("__meta__", b""),
        ("README", b"text"),
        (".hidden.png", b""),
    ]
    for i, (pixels, label) in enumerate(TRAIN):
        key = f"./a.b/{i:02}"  # a dot in a folder is not the end of a key
        members += [(f"{key}.JPG.json", b"x"), (f"{key}.cls", NAMES[label].encode())]
        members += [(f"{key}.PNG", png(pixels)), (f"{key}.seg.png", b"a mask")]
    write_tar(tmp_path / "a.tar", members)
    images = load_images(str(tmp_path), 6, 3)
    same(images, load_images(str(two_sides / "train"), 6, 3))


def test_a_file_cut_anywhere_is_refused_and_named(tmp_path):
    """Every tenth length, and all near the ends and the borders of blocks and records."""
    save_parquet(tmp_path / "parquet" / "a.parquet", TRAIN[:6])
    save_tars(tmp_path / "tar", TRAIN[:6], "a", maxcount=9)
    save_idx(tmp_path / "idx", "train", GREY[0])
    save_idx(tmp_path / "gz", "train", GREY[0], packed=True)
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        folder, whole = path.parent, path.read_bytes()
        named = next(p for p in (folder / "train-images-idx3-ubyte", path) if p.exists())
        named = next((p for p in folder.glob("train-images-*")), named)
        end = whole.rstrip(b"\0")  # an archive ends in zeros, of which 512 must be there
        last = -(-len(end) // 512) * 512 + 511 if path.suffix == ".tar" else len(whole) - 1
        step = max(last // 40, 1)
        lengths = {0, 1, 2, 16, *range(0, last, step), *range(0, last, 512), last - 1, last}
        for length in sorted(lengths):
            path.write_bytes(whole[:length])
            refused(named, path)
        path.write_bytes(whole)
        assert len(load_images(str(named), 6, 3).train_label_N)


def test_a_cifar_file_that_is_no_number_of_records_is_refused(tmp_path):
    save_cifar10(tmp_path, *COLOUR)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    for length in (0, 1, 3072, 3074, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tmp_path, path, f"{length} bytes are not a number of records of 3073")
    path.unlink()
    refused(tmp_path, "belongs to a set without its 'data_batch_2.bin'; add it")
    path.write_bytes(whole)
    (tmp_path / "batches.meta.txt").unlink()
    refused(tmp_path, "'batches.meta.txt', the names of its classes, is not beside it")


def test_bits_that_flip_are_refused_or_change_pixels_alone(tmp_path):
    """A damaged byte gives one line or other pictures, and no other exception."""
    rng = np.random.default_rng(0)
    save_parquet(tmp_path / "parquet" / "a.parquet", TRAIN[:6])
    save_tars(tmp_path / "tar", TRAIN[:6], "a", maxcount=9)
    save_idx(tmp_path / "gz", "train", GREY[0], packed=True)
    found = 0
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        named = next(iter(path.parent.glob("train-images-*")), path)
        for at in rng.integers(0, len(whole), 60):
            broken = bytearray(whole)
            broken[at] ^= 1 << rng.integers(0, 8)
            path.write_bytes(broken)
            try:
                load_images(str(named), 6, 3)
            except UserError as error:
                found += 1
                assert "\n" not in str(error)
        path.write_bytes(whole)
    assert found > 60


def test_a_header_that_is_not_of_the_format_is_refused(tmp_path):
    save_idx(tmp_path, "train", GREY[0])
    images, labels = (tmp_path / f"train-{n}-ubyte" for n in ("images-idx3", "labels-idx1"))
    whole, own = images.read_bytes(), labels.read_bytes()
    for head in (b"\0\0\x0d\3", b"\0\0\10\4", b"\x89PNG"):
        images.write_bytes(head + whole[4:])
        refused(images, images, f"begins with {head.hex(' ')}, not 00 00 08 03")
    images.write_bytes(whole + b"\0")
    refused(images, images, "longer than its header says")
    images.write_bytes(whole)
    labels.write_bytes(whole)
    refused(images, labels, "not 00 00 08 01")
    labels.write_bytes(idx(np.zeros(14, np.uint8)))
    refused(images, labels, "has 14 labels", "15 pictures")
    labels.unlink()
    refused(images, "has no labels beside it", labels)
    labels.write_bytes(own)
    images.write_bytes(idx(np.zeros((0, 9, 7), np.uint8)))
    refused(images, "is an empty array, (0, 9, 7)")
    for name in ("a.parquet", "a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"hello" * 1000)
        refused(tmp_path / name, tmp_path / name, "that can be read")


def test_an_archive_with_another_behind_it_is_refused_rather_than_cut(tmp_path):
    save_tars(tmp_path, TRAIN, "a", maxcount=99)
    path = tmp_path / "a-000000.tar"
    path.write_bytes(2 * path.read_bytes())
    refused(path, path, "no header of a member at byte")


def test_several_formats_in_a_folder_are_refused(tmp_path):
    save_parquet(tmp_path / "a.parquet", TRAIN)
    save_tars(tmp_path / "tars", TRAIN)
    refused(tmp_path, "a.parquet' is Parquet, and", "WebDataset; name the files of one")
    (tmp_path / "cats").mkdir()
    save_cifar10(tmp_path / "c", *COLOUR)
    save_cifar100(tmp_path / "c", *COLOUR)
    refused(tmp_path / "c", "is CIFAR-10, and", "CIFAR-100")
    save_folder(tmp_path / "mixed", TRAIN)
    save_parquet(tmp_path / "mixed" / "a.parquet", TRAIN)
    refused(tmp_path / "mixed", "is Parquet, and", "0000.png' a picture file")


def test_two_sets_in_a_folder_are_not_joined(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        save_idx(tmp_path / "a" / name / "raw", "train", GREY[0])
        save_idx(tmp_path / "a" / name / "raw", "t10k", GREY[1])
    refused(tmp_path / "a", "are of two sets; name the folder of one", tmp_path / "a" / "MNIST")
    for config in ("plain", "augmented"):
        for side, pictures in (("train", TRAIN), ("test", TEST)):
            save_parquet(tmp_path / "b" / config / f"{side}-00000-of-00001.parquet", pictures)
    refused(tmp_path / "b", "are of two sets")
    for side, pictures in (("train", TRAIN), ("test", TEST)):  # the same name on two sides
        save_parquet(tmp_path / "c" / side / "data-00000-of-00001.parquet", pictures)
    assert len(load_images(str(tmp_path / "c"), 6, 3).heldout_label_N) == 6


@pytest.mark.parametrize(
    "name, side",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("val_images_0001.tar.gz", "val"),
        ("dev.tar", "dev"),
        ("Test/part-0.parquet", "test"),
        ("train/test-0.parquet", "train"),
        ("contest-0.tar", ""),
        ("train-test-0.tar", ""),
        ("web/shard-000.tar", ""),
    ],
)
def test_the_side_is_a_folder_or_the_only_such_word_of_a_name(name, side):
    assert side_of(name) == side


def test_one_side_of_a_split_is_refused_in_a_folder(tmp_path):
    save_parquet(tmp_path / "a" / "train.parquet", TRAIN)
    refused(tmp_path / "a", "has files of 'train' and none of 'val' or 'test'", "train.parquet)")
    save_parquet(tmp_path / "a" / "more.parquet", TRAIN)
    refused(tmp_path / "a", "more.parquet' is on no side of a split, while others are on 'train'")
    save_idx(tmp_path / "b", "t10k", GREY[0])
    refused(tmp_path / "b", "has files of 'test' and none of 'train'")
    save_parquet(tmp_path / "c" / "train.parquet", TRAIN)
    save_parquet(tmp_path / "c" / "test.parquet", [x for x in TEST if x[1] != 1])
    refused(tmp_path / "c", "class 'dog' is in 'train' but not in 'test'; both need it")


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["data_batch_1", "batches.meta"],
            "python version, which is pickle and can run any program",
        ),
        (["train", "test", "meta"], "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"),
        (["mnist.pkl"], "is pickle"),
        (["train/data-00000-of-00001.arrow"], "write it with datasets.Dataset.to_parquet"),
        (["mnist.npz"], "no format of pictures that is read here"),
    ],
)
def test_pickle_and_other_formats_are_refused_with_a_remedy(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x80\x04\x95cos\nsystem\n")
    refused(tmp_path, message)
    refused(tmp_path / names[-1], message)


def test_files_that_change_between_labels_and_pixels_are_noticed(tmp_path, monkeypatch):
    from moejax.tasks.images.formats.parquet import Parquet

    save_parquet(tmp_path / "a.parquet", TRAIN)
    read = Parquet.pictures
    for change in (lambda rows: rows[:-1], lambda rows: [*rows, rows[0]], lambda rows: rows * 40):
        monkeypatch.setattr(
            Parquet, "pictures", lambda *a, change=change: iter(change(list(read(*a))))
        )
        refused(tmp_path, "changed while they were read")


@pytest.mark.slow
def test_what_datasets_writes_equals_the_same_pictures_in_folders(two_sides, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES))
    )
    for side, pictures in (("train", TRAIN), ("test", TEST)):
        rows = {
            "image": [Image.fromarray(pixels) for pixels, _ in pictures],
            "label": [label for _, label in pictures],
        }
        whole = datasets.Dataset.from_dict(rows, features=features)
        for i in range(2):
            part = whole.shard(2, i, contiguous=True)
            part.to_parquet(str(tmp_path / f"{side}-0000{i}-of-00002.parquet"))
    same(load_images(str(tmp_path), 6, 3), load_images(str(two_sides), 6, 3))
