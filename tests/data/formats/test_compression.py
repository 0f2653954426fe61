"""Compressed files: all parts are read, and damage is reported after the documents before it."""

import gzip
import hashlib
import random

import pytest

from moejax.data.formats.compression import Damaged, compression_of, open_bytes
from tests.written import COMPRESSORS, json_lines, read

TEXTS = [
    hashlib.sha256(str(i).encode()).hexdigest() * (1 + i % 7) for i in range(6000)
]  # does not compress well, so that several buffers of the reader are filled
LINES = json_lines(TEXTS)


@pytest.mark.parametrize("how", COMPRESSORS)
def test_bytes_come_back(tmp_path, how):
    end = how.rpartition(".")[2]
    rng = random.Random(3)
    for data in (b"", b"a", b"\0" * 3_000_000, rng.randbytes(700_000), LINES[:100_000]):
        if how.startswith("parts"):
            data = data[:20_000] or b"a"  # no part at all would be an empty file
        path = tmp_path / f"x.{end}"
        path.write_bytes(COMPRESSORS[how](data))
        compression = compression_of(path.name)
        assert compression is not None
        with open_bytes(str(path), compression) as stream:
            assert b"".join(iter(lambda: stream.read(10_000), b"")) == data


@pytest.mark.parametrize("how", ["gz", "bz2", "xz", "zst", "stream.zst"])
@pytest.mark.parametrize("share", [0.1, 0.7, 0.999])
def test_a_truncated_file_gives_every_whole_line_before_the_cut(tmp_path, how, share):
    end = how.rpartition(".")[2]
    path = tmp_path / f"a.jsonl.{end}"
    packed = COMPRESSORS[how](LINES)
    path.write_bytes(packed[: int(share * len(packed))])
    texts, bad = read(path)
    assert texts == TEXTS[: len(texts)]
    assert len(bad) == 1
    name = {"gz": "gzip", "bz2": "bzip2", "zst": "Zstandard"}.get(end, end)
    assert bad[0] == (
        f"{path.name}:{len(texts) + 1}: the {name} data end early, as in an incomplete copy or "
        "download; this line and those after it are lost"
    )
    if how == "gz":  # zlib gives all that the bytes contain
        import zlib

        whole = zlib.decompressobj(wbits=31).decompress(path.read_bytes())
        assert len(texts) == whole.count(b"\n")
    if share > 0.5:  # no more than a block of the format is lost
        assert sum(map(len, texts)) > 0.4 * share * sum(map(len, TEXTS))


def test_a_wrong_checksum_is_reported_after_all_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = bytearray(gzip.compress(LINES))
    packed[-8] ^= 1
    path.write_bytes(packed)
    texts, bad = read(path)
    assert texts == TEXTS
    assert len(bad) == 1 and bad[0].startswith("a.jsonl.gz:6001: the gzip data are damaged (")


def test_what_follows_the_compressed_data_is_reported(tmp_path):
    for how in ("gz", "bz2", "xz", "zst"):
        path = tmp_path / f"a.jsonl.{how}"
        path.write_bytes(COMPRESSORS[how](LINES) + b"something else entirely")
        texts, bad = read(path)
        assert texts == TEXTS and len(bad) == 1 and ":6001: the " in bad[0]


def test_zeros_after_the_data_are_padding(tmp_path):
    for how in ("gz", "xz"):
        path = tmp_path / f"a.jsonl.{how}"
        path.write_bytes(COMPRESSORS[how](LINES) + bytes(1024))  # of a tape
        assert read(path) == (TEXTS, [])


def test_plain_text_is_one_document_or_none(tmp_path):
    for how, compress in COMPRESSORS.items():
        path = tmp_path / f"a.txt.{how.rpartition('.')[2]}"
        text = "\ufeffone\r\ntwo \U0001f600\n" * 500
        path.write_bytes(compress(text.encode()))
        assert read(path) == ([text], [])
        path.write_bytes(compress(text.encode())[:-7])
        texts, (bad,) = read(path)
        assert texts == [] and bad.startswith(f"{path.name}: the ")


def test_the_exception_comes_after_the_last_byte(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"x" * 1_000_000)[:-1])
    with open_bytes(str(path), compression_of("a.gz")) as stream:
        count = 0
        with pytest.raises(Damaged, match="end early"):
            while data := stream.read1(1 << 16):
                count += len(data)
        assert count == 1_000_000
