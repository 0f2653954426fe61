"""Token shards: recognised, verified, and the fingerprint."""

import json

import numpy as np
import pytest

from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.shards import fingerprint
from moejax.errors import UserError


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text {i}\n" * 10)
    prepare(str(tmp_path / "text"), "", str(tmp_path / "shards"))
    return tmp_path / "shards"


def edit_index(shards, **changes):
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, **changes}))


def damaged(shards, match):
    with pytest.raises(UserError, match=match) as error:
        load_corpus(str(shards))
    assert str(shards) in str(error.value)


def test_the_fingerprint_covers_the_vocabulary_the_tokens_and_the_boundary():
    a, b = np.arange(6, dtype=np.uint16), np.arange(3, dtype=np.uint16)
    base = fingerprint(256, a, b)
    assert base == fingerprint(256, a.astype(np.uint32), b)
    assert base == fingerprint(256, np.repeat(a, 2)[::2], b)  # not contiguous
    joined = np.concatenate([a, b])
    changed = a.copy()
    changed[3] += 1
    others = [(257, a, b), (256, b, a), (256, joined[:5], joined[5:]), (256, changed, b)]
    assert len({fingerprint(*other) for other in others} | {base}) == 5


def test_every_flipped_byte_of_a_shard_is_noticed(shards):
    for name in ("train.bin", "heldout.bin", "heldout.bytes"):
        data = bytearray((shards / name).read_bytes())
        for at in (0, len(data) // 2, len(data) - 1):
            data[at] ^= 1
            (shards / name).write_bytes(data)
            what = "heldout.bytes does not add" if name == "heldout.bytes" else "fingerprint"
            damaged(shards, f"changed after it was prepared .{what}")
            data[at] ^= 1
        (shards / name).write_bytes(data)
    load_corpus(str(shards))


def test_a_shortened_or_missing_shard_is_noticed(shards):
    data = (shards / "train.bin").read_bytes()
    (shards / "train.bin").write_bytes(data[:-1])
    damaged(shards, "train.bin has .* bytes")
    (shards / "train.bin").unlink()
    damaged(shards, "cannot read .*train.bin")
    (shards / "heldout.bin").unlink()
    damaged(shards, "cannot read .*train.bin")  # and is not trained on as the text of an index


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"vocab_size": 1 << 17}, "bytes"),
        ({"vocab_size": 300}, "fingerprint"),
        ({"vocab_size": "many"}, "no valid field 'vocab_size'"),
        ({"format": "moejax tokens 0"}, "format"),
        ({"surplus": 1}, "not an index"),
    ],
)
def test_a_changed_index_is_noticed(shards, changes, match):
    edit_index(shards, **changes)
    damaged(shards, match)


def test_a_torn_index_is_noticed(shards):
    text = (shards / "index.json").read_text()
    (shards / "index.json").write_text(text[: len(text) // 2])
    damaged(shards, "index.json' is not JSON")


def test_a_folder_of_text_may_contain_an_index_json(tmp_path):
    (tmp_path / "index.json").write_text('{"pages": 3}')
    (tmp_path / "page.txt").write_text("hello")
    corpus = load_corpus(str(tmp_path), eval_fraction=0.3)
    assert (len(corpus.train_N), len(corpus.heldout_N)) == (12, 5)


def as_version_1(shards, tokenizer):
    """The folder as the first format had it: without bytes per token, facts and overlap."""
    index = json.loads((shards / "index.json").read_text())
    for field in ("train_bytes", "heldout_bytes", "facts", "overlap"):
        del index[field]
    more = {"train_bytes_per_token": 1.0, "heldout_bytes_per_token": 1.0, "tokenizer": tokenizer}
    index |= {**more, "format": "moejax tokens 1"}
    (shards / "index.json").write_text(json.dumps(index))
    (shards / "heldout.bytes").unlink()


def test_shards_of_the_first_format_are_read_without_the_missing_facts(shards):
    before = load_corpus(str(shards))
    as_version_1(shards, "bytes")
    corpus = load_corpus(str(shards))
    assert corpus.fingerprint == before.fingerprint and corpus.overlap is None
    np.testing.assert_array_equal(corpus.heldout_size_M, before.heldout_size_M)
    edit_index(shards, tokenizer="bpe.json")
    assert load_corpus(str(shards)).heldout_size_M is None
