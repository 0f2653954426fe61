"""Token arrays of other programs: the same tokens, documents and sides."""

import dataclasses

import numpy as np
import pytest

from moejax.data.load import load_corpus
from moejax.data.shards import fingerprint
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from moejax.tasks.language.rows import train_rows
from moejax.tasks.language.source import TextSource
from tests.token_arrays import llmc, megatron, nanogpt, random_documents

TRAIN, HELD = random_documents(40), random_documents(6, seed=1)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level tokenizer of 300 tokens whose separator is id 0."""
    root = tmp_path_factory.mktemp("bpe")
    (root / "text.txt").write_text("the router sends tokens to the experts, and so on. é\n" * 40)
    train_bpe(str(root / "text.txt"), 300, str(root / "bpe.json"))
    tokenizer = load_tokenizer(str(root / "bpe.json"))
    assert (tokenizer.separator, tokenizer.vocab_size > 280) == (0, True)
    return root / "bpe.json"


def below(documents, vocab):
    return [np.minimum(document, vocab - 1) for document in documents]


def documents_of(tokens_N, start_D, separator):
    """Documents by the contract of `Corpus`: a separator behind each but the last."""
    stop_D = np.append(start_D[1:] - 1, len(tokens_N))
    assert all(int(tokens_N[int(stop)]) == separator for stop in stop_D[:-1])
    return [tokens_N[int(a) : int(b)].tolist() for a, b in zip(start_D, stop_D, strict=True)]


def lists(documents):
    return [document.tolist() for document in documents]


def test_nanogpt_files_are_read_as_they_are(tmp_path):
    train = nanogpt(tmp_path / "train.bin", TRAIN)
    held = nanogpt(tmp_path / "val.bin", HELD)
    (tmp_path / "meta.pkl").write_bytes(b"not a pickle: it is never opened")
    (tmp_path / "input.txt").write_text("the text")
    corpus = load_corpus(str(tmp_path))
    np.testing.assert_array_equal(corpus.train_N, train)
    np.testing.assert_array_equal(corpus.heldout_N, held)
    assert corpus.vocab_size == max(train.max(), held.max()) + 1
    assert corpus.fingerprint == fingerprint(corpus.vocab_size, train, held)
    assert (corpus.heldout_size_M, corpus.train_start_D, corpus.origin) == (None, None, None)
    assert corpus.facts.split == "what is called 'val'"
    assert load_corpus(str(tmp_path), vocab_size=512).vocab_size == 512


def test_nanogpt_documents_end_at_the_separator_of_the_tokenizer(tmp_path, bpe):
    size = load_tokenizer(str(bpe)).vocab_size
    train, held = below(TRAIN, size), below(HELD, size)
    nanogpt(tmp_path / "train.bin", train)
    nanogpt(tmp_path / "val.bin", held)
    corpus = load_corpus(str(tmp_path), str(bpe))
    assert documents_of(corpus.train_N, corpus.train_start_D, 0) == lists(train)
    assert documents_of(corpus.heldout_N, corpus.heldout_start_D, 0) == lists(held)
    assert corpus.vocab_size == size and corpus.facts.separator == "<|doc|>"
    sizes = load_tokenizer(str(bpe)).token_bytes()
    np.testing.assert_array_equal(corpus.heldout_size_M, sizes[corpus.heldout_N])


@pytest.mark.parametrize("llama", [False, True])
def test_llmc_files_are_read_without_their_header_and_joined(tmp_path, bpe, llama):
    size = load_tokenizer(str(bpe)).vocab_size
    train, held = below(TRAIN, size), below(HELD, size)
    first = llmc(tmp_path / "web_train_000001.bin", train[:25], llama=llama)
    second = llmc(tmp_path / "web_train_000002.bin", train[25:], llama=llama)
    llmc(tmp_path / "web_val_000000.bin", held, llama=llama)
    corpus = load_corpus(str(tmp_path), str(bpe))
    np.testing.assert_array_equal(corpus.train_N, np.concatenate([first, second]))
    assert corpus.train_N.dtype == np.uint16
    assert documents_of(corpus.train_N, corpus.train_start_D, 0) == lists(train)
    assert documents_of(corpus.heldout_N, corpus.heldout_start_D, 0) == lists(held)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_megatron_documents_come_from_its_index(tmp_path, dtype):
    for side, documents in (("train", TRAIN), ("val", HELD)):
        (tmp_path / side).mkdir()
        pieces = [[d[: len(d) // 2], np.append(d[len(d) // 2 :], 0)] for d in documents]
        megatron(tmp_path / side / "web_text_document", [*pieces, []], dtype)
    corpus = load_corpus(str(tmp_path))
    assert documents_of(corpus.train_N, corpus.train_start_D, 0) == lists(TRAIN)
    assert documents_of(corpus.heldout_N, corpus.heldout_start_D, 0) == lists(HELD)
    assert (corpus.separator, corpus.facts.separator) == (0, "id 0")
    assert corpus.train_N[0:3].dtype == np.uint16
    by_prefix = load_corpus(
        str(tmp_path / "train" / "web_text_document"),
        eval_path=str(tmp_path / "val" / "web_text_document.idx"),
    )
    assert by_prefix.fingerprint == corpus.fingerprint


def test_megatron_documents_without_a_token_behind_them_have_no_separator(tmp_path):
    documents = [np.append(d, 7) for d in TRAIN]  # all end in 7, which also stands inside them
    assert any(7 in d[:-1] for d in documents)
    megatron(tmp_path / "web", [[d] for d in documents])
    corpus = load_corpus(str(tmp_path / "web.bin"), eval_fraction=0.2)
    assert (corpus.separator, corpus.train_start_D, corpus.heldout_start_D) == (-1, None, None)
    begins = np.cumsum([len(d) for d in documents])
    assert len(corpus.train_N) in begins  # the index still tells where to cut
    assert corpus.facts.train_documents + corpus.facts.heldout_documents == len(documents)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int32", ">i8", "uint64"])
def test_numpy_files_of_any_integer_type_are_read(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 128, 1000)
    np.save(tmp_path / "ids.npy", ids.astype(dtype))
    corpus = load_corpus(str(tmp_path / "ids.npy"), eval_fraction=0.1)
    joined = np.concatenate([corpus.train_N[:], corpus.heldout_N[:]])
    np.testing.assert_array_equal(joined, ids)
    assert joined.dtype == np.uint16 and len(corpus.heldout_N) == 100


def test_equal_tokens_of_different_formats_have_one_fingerprint(tmp_path):
    tokens = nanogpt(tmp_path / "a.bin", TRAIN, eot=None)
    np.save(tmp_path / "b.npy", tokens.astype(np.int64))
    prints = {load_corpus(str(tmp_path / name)).fingerprint for name in ("a.bin", "b.npy")}
    assert len(prints) == 1


def test_the_held_out_share_begins_where_a_document_begins(tmp_path, bpe):
    size = load_tokenizer(str(bpe)).vocab_size
    documents = below(TRAIN, size)
    tokens = nanogpt(tmp_path / "all.bin", documents)
    corpus = load_corpus(str(tmp_path / "all.bin"), str(bpe), eval_fraction=0.1)
    held = documents_of(corpus.heldout_N, corpus.heldout_start_D, 0)
    train = documents_of(corpus.train_N, corpus.train_start_D, 0)
    assert train + held == lists(documents)
    ends = np.cumsum([len(d) + 1 for d in documents])
    nearest = min(abs(len(tokens) - ends - 0.1 * len(tokens)))
    assert abs(len(corpus.heldout_N) + 1 - 0.1 * len(tokens)) == nearest
    unknown = load_corpus(str(tmp_path / "all.bin"), eval_fraction=0.1)
    assert len(unknown.heldout_N) == round(0.1 * len(tokens))
    assert unknown.facts.split == "the last 10% of the tokens"


def test_a_document_longer_than_the_held_out_share_is_cut(tmp_path, bpe):
    documents = [np.full(900, 5), np.full(90, 6)]
    nanogpt(tmp_path / "all.bin", documents[::-1])
    corpus = load_corpus(str(tmp_path / "all.bin"), str(bpe), eval_fraction=0.1)
    assert len(corpus.heldout_N) + 1 == round(0.1 * 992)
    assert corpus.heldout_start_D is not None and corpus.train_start_D is not None
    assert corpus.heldout_start_D.tolist() == [0] and set(corpus.heldout_N[:].tolist()) == {5}
    assert corpus.train_start_D.tolist() == [0, 91]


def test_lists_and_globs_of_arrays_make_one_stream_in_order(tmp_path):
    parts = [nanogpt(tmp_path / f"{i}.bin", [d], eot=None) for i, d in enumerate(TRAIN[:4])]
    np.save(tmp_path / "own.npy", HELD[0])
    own = str(tmp_path / "own.npy")
    by_glob = load_corpus(str(tmp_path / "*.bin"), eval_path=own)
    np.testing.assert_array_equal(by_glob.train_N, np.concatenate(parts))
    np.testing.assert_array_equal(by_glob.heldout_N, HELD[0])
    listed = load_corpus(f"{tmp_path}/2.bin,{tmp_path}/0.bin", eval_path=own)
    np.testing.assert_array_equal(listed.train_N, np.concatenate([parts[2], parts[0]]))
    folder = load_corpus(str(tmp_path), eval_path=own)  # whose file is not trained on
    assert folder.fingerprint == by_glob.fingerprint


@pytest.mark.parametrize(
    "name, side",
    [
        ("train.bin", "train"),
        ("fineweb_train_000001.bin", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("train/web_text_document.bin", "train"),
        ("validation/train.bin", "validation"),
        ("tiny-test.npy", "test"),
        ("contest.bin", ""),
        ("test_set_train.bin", "train"),
    ],
)
def test_sides_in_names(name, side):
    from moejax.data.arrays.sides import side_of

    assert side_of(name) == side


def test_a_source_of_several_files_evaluates_like_one_of_a_single_array(tmp_path, bpe):
    size = load_tokenizer(str(bpe)).vocab_size
    documents = below(TRAIN, size)
    for i in range(4):
        llmc(tmp_path / f"train_{i}.bin", documents[10 * i : 10 * (i + 1)])
    llmc(tmp_path / "val_0.bin", below(HELD, size))
    corpus = load_corpus(str(tmp_path), str(bpe))
    source = TextSource(corpus, 16, 4, 0, 8)
    whole = corpus.train_N[:]
    batch = source.train_batch(3)
    rows = [whole[at : at + 17].tolist() for at in range(0, len(whole) - 16, 16)]
    assert all(row in rows for row in batch["tokens"].tolist())
    targets = np.concatenate([b["tokens"][:, 1:][b["valid"]] for b in source.eval_batches(4, 8)])
    sizes = load_tokenizer(str(bpe)).token_bytes()
    assert source.evaluated["bytes"] == sizes[targets].sum()
    assert 0 < source.baselines()["bigram"] < 20
    assert source.token_counts(size).sum() == len(whole)
    line = source.facts()["read as"]
    assert line.startswith(f"5 files of llm.c .bin, uint16; a vocabulary of {size} ids")
    assert "bytes" not in " ".join(source.warnings())


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_documents_of_several_files_are_packed_like_those_of_one_array(tmp_path, bpe, packing):
    size = load_tokenizer(str(bpe)).vocab_size
    documents = below(TRAIN, size)
    for i in range(4):
        nanogpt(tmp_path / f"train_{i}.bin", documents[10 * i : 10 * (i + 1)])
    nanogpt(tmp_path / "val.bin", below(HELD, size))
    corpus = load_corpus(str(tmp_path), str(bpe))
    rows = train_rows(corpus, 32, packing)
    whole = dataclasses.replace(corpus, train_N=np.asarray(corpus.train_N[:]))
    every = np.arange(len(rows))
    batch, expected = rows.read(every, every), train_rows(whole, 32, packing).read(every, every)
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])
    targets = batch["tokens"][:, 1:][batch["valid"]]
    assert (targets == 0).sum() == len(documents)  # each ends once
    ids = np.sort(np.concatenate(documents))
    np.testing.assert_array_equal(np.sort(targets[targets != 0]), ids)


def test_an_opening_is_found_where_it_begins_every_document(tmp_path, bpe):
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_file(str(bpe))
    made.add_special_tokens(["<s>"])
    bos = made.get_vocab()["<s>"]
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    made.save(str(tmp_path / "bos.json"))
    documents = below(TRAIN[:20], bos)
    opened = [np.append(bos, document) for document in documents]
    for name, ids in (("both", opened), ("eos", documents)):
        (tmp_path / name).mkdir()
        nanogpt(tmp_path / name / "train.bin", ids)
        nanogpt(tmp_path / name / "val.bin", ids[:5])
    (tmp_path / "bos").mkdir()
    for side in ("train", "val"):  # as llm.c writes Llama 3's tokens
        llmc(tmp_path / "bos" / f"{side}.bin", documents, eot=bos, llama=True)
    both, eos, only = (
        load_corpus(str(tmp_path / name), str(tmp_path / "bos.json"))
        for name in ("both", "eos", "bos")
    )
    assert [(c.separator, c.opening) for c in (both, eos, only)] == [
        (0, (bos,)),
        (0, ()),
        (bos, ()),
    ]
    assert documents_of(both.train_N, both.train_start_D, 0) == lists(opened)
    assert documents_of(only.train_N, only.train_start_D, bos) == lists(documents)
    assert both.heldout_size_M is not None and only.heldout_size_M is not None
    assert both.heldout_size_M[0] == 0 and only.heldout_size_M[0] == 1
    text = sum(load_tokenizer(str(bpe)).token_bytes()[np.concatenate(documents[:5])])
    assert both.heldout_size_M[:].sum() == text + 4  # separators


def test_packing_without_known_documents_is_refused(tmp_path):
    nanogpt(tmp_path / "train.bin", TRAIN)
    nanogpt(tmp_path / "val.bin", HELD)
    with pytest.raises(UserError, match="data.packing=greedy: .*not known.*data.tokenizer"):
        train_rows(load_corpus(str(tmp_path)), 32, "greedy")
