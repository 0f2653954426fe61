"""SentencePiece models as tokenizers, against the library itself."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece

from moejax.data.documents import Document, Piece, find_documents
from moejax.data.text_stream import encode_documents, encode_sized
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.sentencepiece_file import SentencePieceTokenizer
from moejax.errors import UserError

LOSSLESS = {
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "byte_fallback": True,
}  # fmt: skip
WORDS = "the router sends a token to each expert while naïve gates balance their load".split()
TEXTS = (
    "the token",
    " the token ",
    "\n\n  each\texpert\r\n",
    "naïve — 日本語 🙂 مرحبا",
    "\x00\x07 <s> </s> <unk> <0x41>",
    " ",
    "   ",
    "e\u0301 ﬁ Ａ \ufeff\u2028\u00a0",
)
KINDS = {
    "unigram": {},
    "bpe": {"model_type": "bpe"},
    "char": {"model_type": "char"},
    "no_prefix": {"add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
    "whitespace_only_pieces": {"allow_whitespace_only_pieces": True, "model_type": "bpe"},
}


def trained(path: pathlib.Path, base=LOSSLESS, **options) -> str:
    """A small model. Its training is deterministic."""
    rng, model = np.random.default_rng(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choice(WORDS, 12)) for _ in range(200)),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{"vocab_size": 340, **base, **options},
    )
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def each(request, tmp_path_factory) -> str:
    """The path of a model of each kind."""
    return trained(tmp_path_factory.mktemp("models") / "each.model", **KINDS[request.param])


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> str:
    return trained(tmp_path_factory.mktemp("models") / "unigram.model")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A document for each text."""
    root = tmp_path / "text"
    root.mkdir()
    for i, text in enumerate(TEXTS):
        (root / f"{i}.txt").write_bytes(text.encode())
    return root


def piece(text: str) -> Piece:
    data = text.encode()
    return Piece(Document("text", "a text", len(data)), data, True)


def stream(folder, tokenizer) -> tuple[np.ndarray, int]:
    tokens, sizes = zip(*encode_documents(find_documents(str(folder)), tokenizer), strict=True)
    return np.concatenate(tokens), sum(sizes)


def test_a_text_has_the_tokens_of_the_library_and_comes_back(each):
    tokenizer, library = load_tokenizer(each), sentencepiece.SentencePieceProcessor(each)
    for text, ids in zip(TEXTS, tokenizer.encode([*map(piece, TEXTS)]), strict=True):
        assert ids.tolist() == library.encode(text)
        assert tokenizer.decode(ids.tolist()) == text == library.decode(ids.tolist())
        assert tokenizer.separator not in ids  # "</s>" in a text is not a separator
    assert tokenizer.vocab_size == library.vocab_size()
    assert not tokenizer.is_byte_level


def test_the_bytes_of_tokens_are_those_of_the_librarys_offsets(each):
    tokenizer, library = load_tokenizer(each), sentencepiece.SentencePieceProcessor(each)
    for text in TEXTS:
        ids = tokenizer.encode([piece(text)])[0]
        sizes = tokenizer.sizes(piece(text), ids)
        assert sizes.sum() == len(text.encode()) and sizes.dtype == np.uint32
        end = 0
        for covered, size, total in zip(
            library.encode(text, return_type="proto").pieces, sizes, sizes.cumsum(), strict=True
        ):
            if library.is_byte(covered.id):
                assert size == 1
            if covered.surface or not library.is_byte(covered.id):
                assert total == covered.end, text  # in bytes
                end = covered.end
        assert end == len(text.encode())


def test_documents_are_joined_by_the_end_token_and_begin_with_the_begin_token(unigram, folder):
    library = sentencepiece.SentencePieceProcessor(unigram)
    tokenizer = load_tokenizer(unigram)
    assert (tokenizer.separator, tokenizer.separator_token) == (library.eos_id(), "</s>")
    assert tokenizer.opening == (library.bos_id(),)
    wanted = library.encode(list(TEXTS), add_bos=True, add_eos=True)
    tokens, size = stream(folder, tokenizer)
    assert tokens.tolist() == sum(wanted, [])[:-1]  # nothing behind the last document
    assert size == sum(len(text.encode()) for text in TEXTS) + len(TEXTS) - 1
    assert tokenizer.decode(tokens.tolist()) == "<s>" + "</s><s>".join(TEXTS)
    parts = zip(*encode_sized(find_documents(str(folder)), tokenizer), strict=True)
    again, sizes = map(np.concatenate, parts)
    np.testing.assert_array_equal(again, tokens)
    assert set(sizes[tokens == library.bos_id()]) == {0}
    assert set(sizes[tokens == library.eos_id()]) == {1}
    assert sizes.sum() == size


def test_without_an_opening_the_stream_has_separators_alone(unigram, folder):
    library = sentencepiece.SentencePieceProcessor(unigram)
    tokens, size = stream(folder, load_tokenizer(unigram, bos="none"))
    assert tokens.tolist() == sum(library.encode(list(TEXTS), add_eos=True), [])[:-1]
    assert size == stream(folder, ByteTokenizer())[1]


def test_special_tokens_of_other_names_and_numbers_are_found(tmp_path):
    path = trained(tmp_path / "a.model", bos_id=-1, eos_id=3, eos_piece="<end>", pad_id=1, unk_id=0)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.separator, tokenizer.separator_token, tokenizer.opening) == (3, "<end>", ())
    path = trained(tmp_path / "b.model", eos_id=-1)
    with pytest.raises(UserError, match="b.model' has no token that ends a text.* eos_id"):
        load_tokenizer(path)
    path = trained(tmp_path / "c.model", eos_id=-1, control_symbols=["<|endoftext|>"])
    assert load_tokenizer(path).separator_token == "<|endoftext|>"
    # A symbol that a text may hold does not tell documents apart.
    path = trained(tmp_path / "d.model", eos_id=-1, user_defined_symbols=["<|endoftext|>"])
    with pytest.raises(UserError, match="no token that ends a text"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "the\ntoken"),
        ({"normalization_rule_name": "nfkc"}, "ﬁ"),
        ({"remove_extra_whitespaces": True}, "the  token"),
        ({"byte_fallback": False}, "日"),
    ],
)
def test_a_model_that_loses_text_is_refused_with_the_way_to_train_one(tmp_path, options, text):
    tokenizer = load_tokenizer(trained(tmp_path / "lossy.model", **options))
    assert len(tokenizer.encode([piece("the token")])) == 1
    with pytest.raises(UserError) as error:
        tokenizer.encode([piece("the token"), piece(text)])
    assert "lossy.model' does not give back the text of 'a text' (" in str(error.value)
    for name, value in LOSSLESS.items():
        assert f"{name}={value}" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_trainers_default_is_refused(tmp_path):
    tokenizer = load_tokenizer(trained(tmp_path / "t.model", base={}))
    with pytest.raises(UserError, match=r"\('  token' becomes 'token'\); train it with norm"):
        tokenizer.encode([piece("the   token")])


def test_the_character_that_stands_for_a_space_is_refused_by_name(unigram):
    with pytest.raises(UserError, match=r"cannot give back the character U\+2581 of 'a text'"):
        load_tokenizer(unigram).encode([piece("the\u2581token")])


def test_text_that_is_not_utf8_is_refused(unigram):
    data = "é".encode("latin-1")
    with pytest.raises(UserError, match="'a text' is not UTF-8"):
        load_tokenizer(unigram).encode([Piece(Document("text", "a text", 1), data, True)])


def test_a_file_that_is_no_model_is_an_error_that_names_it(tmp_path, unigram):
    whole = pathlib.Path(unigram).read_bytes()
    for name, data in {
        "empty.model": b"",
        "tiktoken.model": b"IQ== 0\nIg== 1\n",
        "json.model": json.dumps({"model": {}}).encode(),
        "half.model": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"data.tokenizer: '.*{name}' is not a model of Sent"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match="data.tokenizer: cannot read '.*none.model': No such file"):
        load_tokenizer(str(tmp_path / "none.model"))


def test_tokens_are_readable(unigram):
    tokenizer = SentencePieceTokenizer(unigram)
    library = sentencepiece.SentencePieceProcessor(unigram)
    texts = tokenizer.token_text()
    assert len(texts) == tokenizer.vocab_size and all(text.isprintable() for text in texts)
    ids = tokenizer.encode([piece("the token\n日")])[0]
    assert "".join(texts[i] for i in ids) == r" the token\n<0xE6><0x97><0xA5>"
    assert texts[library.piece_to_id("<0x41>")] == "A" and texts[tokenizer.separator] == "</s>"
    with pytest.raises(UserError, match="not byte-level"):
        tokenizer.token_bytes()


def test_each_prefix_of_tokens_decodes_to_text_that_the_next_extends(unigram):
    """`moejax generate` decodes a growing text behind the end of its prompt."""
    tokenizer = load_tokenizer(unigram)
    own = tokenizer.encode([piece("the token to each expert 日")])[0]
    ids, before = [*tokenizer.opening, *own.tolist()], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        assert text.startswith(before.rstrip("\ufffd"))
        before = text
    assert before == "<s>the token to each expert 日"
