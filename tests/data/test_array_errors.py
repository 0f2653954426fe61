"""Damaged token arrays, and files that hold no ids: one line with field, file and remedy."""

import struct

import numpy as np
import pytest

from moejax.data.arrays.raw import width
from moejax.data.load import load_corpus
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError
from tests.token_arrays import llmc, megatron, nanogpt, random_documents

DOCUMENTS = random_documents(10)


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        load_corpus(str(path), **options)
    message = str(error.value)
    assert message.startswith("data.") and "\n" not in message
    assert ";" in message  # the remedy
    return message


def edited(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


# ---------------------------------------------------------------- raw


def test_an_odd_number_of_bytes_is_refused(tmp_path):
    nanogpt(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    refused(tmp_path / "a.bin", "no whole number of uint16")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty"),
        ("The quick brown fox, é.\n".encode() * 5000, "looks like text"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),  # weights that PyTorch saved
        (b"\x7fELF" + bytes(100), "a compiled program"),
    ],
)
def test_a_bin_file_of_something_else_is_refused(tmp_path, content, match):
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin", match)


@pytest.mark.parametrize(
    "dtype, low, high",
    [
        ("<u2", 0, 4),  # four letters
        ("<u2", 0, 65),  # characters
        ("<u2", 0, 50257),
        ("<u4", 0, 50257),
        ("<u4", 0, 200_000),
        ("<u4", 1, 65),
        ("<i8", 0, 128_000),
        ("<i8", 1, 65),
    ],
)
def test_the_width_of_ids_without_a_header_is_seen_in_them(dtype, low, high):
    ids = np.random.default_rng(0).integers(low, high, 40_000).astype(dtype)
    assert width(ids.tobytes()[: 1 << 16], ids.nbytes, 0) == np.dtype(dtype)


def test_few_ids_are_as_wide_as_the_vocabulary_needs():
    ids = np.array([70_000, 3, 5], "<u4")
    assert width(ids.tobytes(), ids.nbytes, 100_000) == np.dtype("<u4")
    assert width(ids.tobytes(), ids.nbytes, 0) == np.dtype("<u2")
    assert width(ids.tobytes(), ids.nbytes, 50_000) == np.dtype("<u2")
    narrow = np.full(10, 40_000, "<u2")  # as uint32 they would not be in the vocabulary
    assert width(narrow.tobytes(), narrow.nbytes, 100_000) == np.dtype("<u2")


# ---------------------------------------------------------------- llm.c


def test_damaged_llmc_files_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    llmc(path, DOCUMENTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    refused(path, "counts .* tokens of 2 bytes")
    path.write_bytes(whole + b"\0\0")
    refused(path, "counts .* tokens of 2 bytes")
    path.write_bytes(whole[:1000])
    refused(path, "ends in its llm.c header")
    path.write_bytes(whole)
    edited(path, 4, struct.pack("<i", 2))
    refused(path, "version 2 of llm.c's format, not 1")
    edited(path, 0, struct.pack("<i", 20240522))
    refused(path, "multiple-choice questions")
    edited(path, 0, struct.pack("<iii", 20240520, 1, -5))
    refused(path, "counts -5 tokens")


# ---------------------------------------------------------------- Megatron


@pytest.fixture
def web(tmp_path):
    megatron(tmp_path / "web", [[d, d] for d in DOCUMENTS])
    return tmp_path / "web.idx", tmp_path / "web.bin"


def test_an_index_without_its_ids_is_refused(web):
    web[1].unlink()
    refused(web[0], "'web.bin', which is missing")
    refused(web[0].parent, "'web.bin', which is missing")


@pytest.mark.parametrize(
    "at, data, match",
    [
        (0, b"TNTIDX\x00\x00", "does not begin with"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "floating-point numbers"),
        (17, b"\x63", "unknown type 99"),
        (18, struct.pack("<Q", 19), "not the .* that its header counts"),
        (26, struct.pack("<Q", 5), "not the .* that its header counts"),
        (17, b"\x04", "puts sequence 1 .* at byte"),  # int32: the offsets do not fit
        (34, struct.pack("<i", -4), "puts sequence 0 .length -4."),
        (34 + 12 * 20 + 8, struct.pack("<q", 21), "not ascending"),
        (34 + 12 * 20, struct.pack("<q", 1), "not ascending"),
    ],
)
def test_a_damaged_index_is_refused(web, at, data, match):
    edited(web[0], at, data)
    refused(web[1], match)


def test_truncated_megatron_files_are_refused(web):
    ids, index = web[1].read_bytes(), web[0].read_bytes()
    web[1].write_bytes(ids[:-2])
    refused(web[1], "its index counts")
    web[1].write_bytes(ids)
    for size in (4, 20, len(index) - 8):
        web[0].write_bytes(index[:size])
        refused(web[1], "does not begin with" if size == 4 else "that its header counts")


def test_a_multimodal_dataset_is_refused(tmp_path):
    megatron(tmp_path / "web", [[d] for d in DOCUMENTS], modes=True)
    refused(tmp_path / "web.bin", "modes of a multimodal dataset")


# ---------------------------------------------------------------- NumPy


@pytest.mark.parametrize(
    "array, match",
    [
        (np.ones(9, np.float32), "holds float32 and no integers"),
        (np.ones(9, bool), "holds bool and no integers"),
        (np.ones((3, 3), np.uint16), r"has shape \(3, 3\)"),
        (np.array(3), r"has shape \(\)"),
        (np.array([None, "a"]), "damaged or holds no numbers"),
        (np.zeros(0, np.uint16), "is empty"),
    ],
)
def test_numpy_files_of_other_arrays_are_refused(tmp_path, array, match):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    refused(tmp_path / "a.npy", match)


def test_damaged_numpy_files_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "damaged or holds no numbers")
    path.write_bytes(whole[:20])
    refused(path, "damaged or holds no numbers")
    with open(path, "wb") as file:
        np.save(file, np.arange(100))
        np.save(file, np.arange(100))
    refused(path, "928 bytes behind its array")
    np.arange(100).tofile(path)  # as OLMo's files, which have the name but no header
    refused(path, "ids without a header are read from files named .bin")


# ---------------------------------------------------------------- ids and the vocabulary


def test_an_id_outside_the_vocabulary_is_named_with_its_position(tmp_path):
    train_bpe(str(__file__), 300, str(tmp_path / "bpe.json"))
    ids = np.full(9_000_000, 7, np.uint16)
    ids[[8_388_700, 8_999_999]] = 301, 65_000
    ids.tofile(tmp_path / "a.bin")
    path = tmp_path / "a.bin"
    message = refused(path, "the id 301 at token 8388700", vocab_size=301)
    assert "but ids are below 301 (model.vocab_size); raise it" in message
    message = refused(path, "the id 301 at token 8388700", tokenizer=str(tmp_path / "bpe.json"))
    assert "name the tokenizer that made the ids" in message
    assert load_corpus(str(path)).vocab_size == 65_001


def test_a_negative_id_is_named_with_its_position(tmp_path):
    ids = np.arange(100)
    ids[41] = -100
    np.save(tmp_path / "a.npy", ids)
    refused(tmp_path / "a.npy", "the id -100 at token 41, and ids are not negative")
    megatron(tmp_path / "web", [[ids]], np.int32)
    refused(tmp_path / "web.bin", "the id -100 at token 41")


# ---------------------------------------------------------------- paths


def test_arrays_beside_text_are_refused_unless_they_are_two_sides(tmp_path):
    nanogpt(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / "b.txt").write_text("some text")
    refused(tmp_path, r"a.bin' holds token ids and '.*b.txt' does not.*FOLDER/\*.bin")
    (tmp_path / "b.txt").rename(tmp_path / "readme.md")
    load_corpus(str(tmp_path))
    (tmp_path / "input.txt").write_text("some text")
    (tmp_path / "a.bin").rename(tmp_path / "train.bin")
    refused(tmp_path, "input.txt")
    nanogpt(tmp_path / "val.bin", DOCUMENTS)
    load_corpus(str(tmp_path))
    (tmp_path / "deep").mkdir()
    (tmp_path / "input.txt").rename(tmp_path / "deep" / "input.txt")
    refused(tmp_path, "input.txt")


def test_text_to_hold_out_beside_arrays_is_refused(tmp_path):
    nanogpt(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / "b.txt").write_text("some text")
    message = refused(tmp_path / "a.bin", "names no token arrays", eval_path=f"{tmp_path}/b.txt")
    assert message.startswith("data.eval_path")
    refused(
        tmp_path / "a.bin", "contains everything in data.path", eval_path=str(tmp_path / "a.bin")
    )


def test_a_single_token_cannot_be_split(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3]))
    refused(tmp_path / "a.npy", "nothing is left to hold out")
