"""Byte tokens, tokenizer files, and training one."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers

from moejax.data.documents import find_documents, pieces
from moejax.data.text_stream import encode_documents, encode_sized
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.interface import DOCUMENT_TOKEN, SEPARATORS, token_dtype
from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError

TEXT = "def f(x):\r\n\treturn  x  # naïve — 日本語 🙂 <|doc|>\n\n\n  end \x00\x07\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("text")
    for i in range(4):
        (root / f"{i}.txt").write_bytes((TEXT * (i + 1)).encode())
    return root


@pytest.fixture(scope="module")
def bpe(folder) -> str:
    out = folder.parent / "bpe" / "tokenizer.json"
    assert train_bpe(str(folder), 300, str(out), eval_fraction=0.25) == 300
    return str(out)


def save(tokenizer: tokenizers.Tokenizer, path: pathlib.Path) -> str:
    tokenizer.save(str(path))
    return str(path)


def stream(folder, tokenizer) -> tuple[np.ndarray, int]:
    parts = list(encode_documents(find_documents(str(folder)), tokenizer))
    return np.concatenate([tokens for tokens, _ in parts]), sum(size for _, size in parts)


def test_byte_tokens_are_the_bytes_joined_by_zeros(folder):
    tokens, size = stream(folder, load_tokenizer(""))
    joined = b"\0".join((folder / f"{i}.txt").read_bytes() for i in range(4))
    assert tokens.astype(np.uint8).tobytes() == joined
    assert size == len(joined) == len(tokens)
    assert tokens.dtype == np.uint16


def test_a_trained_bpe_is_lossless_and_compresses(folder, bpe):
    tokenizer = JsonTokenizer(bpe)
    documents = find_documents(str(folder))
    oracle = tokenizers.Tokenizer.from_file(bpe)
    for piece in pieces(documents):
        ids = tokenizer.encode([piece])[0]
        assert oracle.decode(ids.tolist(), skip_special_tokens=False).encode() == piece.data
        assert len(ids) < 0.8 * len(piece.data)
        assert tokenizer.separator not in ids  # the text "<|doc|>" is not a separator
        assert tokenizer.token_bytes()[ids].sum() == len(piece.data)


def test_the_stream_has_one_separator_between_documents_which_counts_as_one_byte(folder, bpe):
    tokenizer = JsonTokenizer(bpe)
    tokens, size = stream(folder, tokenizer)
    assert (tokens == tokenizer.separator).sum() == 3
    assert size == stream(folder, ByteTokenizer())[1]
    assert tokenizer.token_bytes()[tokens].sum() == size


def test_training_twice_gives_the_same_file(folder, bpe, tmp_path):
    train_bpe(str(folder), 300, str(tmp_path / "again.json"), eval_fraction=0.25)
    assert (tmp_path / "again.json").read_bytes() == pathlib.Path(bpe).read_bytes()


def test_a_tokenizer_learns_nothing_from_heldout_files(tmp_path):
    (tmp_path / "text").mkdir()
    words = ["alpha", "bravo", "charlie", "delta"]
    for word in words:
        (tmp_path / "text" / word).write_text(f"{word} " * 50)
    train_bpe(str(tmp_path / "text"), 400, str(tmp_path / "t.json"), eval_fraction=0.25)
    vocab = json.loads((tmp_path / "t.json").read_text())["model"]["vocab"]
    assert sum(word in vocab for word in words) == 3


def test_settings_in_the_file_that_lose_text_are_switched_off(bpe, folder, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(bpe)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=1000)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{DOCUMENT_TOKEN} $A", special_tokens=[(DOCUMENT_TOKEN, 0)]
    )
    tokenizer.model.dropout = 0.5  # of merges, at random: no two starts would read the same text
    changed = JsonTokenizer(save(tokenizer, tmp_path / "t.json"))
    np.testing.assert_array_equal(stream(folder, changed)[0], stream(folder, JsonTokenizer(bpe))[0])


def test_a_tokenizer_that_loses_text_is_refused(folder, bpe, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    (tmp_path / "upper.txt").write_text("Upper")
    lossy = JsonTokenizer(save(tokenizer, tmp_path / "t.json"))
    with pytest.raises(UserError, match="'.*t.json' does not give back the text of '.*upper.txt'"):
        stream(tmp_path / "upper.txt", lossy)


def test_text_that_is_not_utf8_is_refused_by_tokenizer_files_and_training(bpe, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    with pytest.raises(UserError, match="latin.txt' is not UTF-8"):
        stream(tmp_path, JsonTokenizer(bpe))
    with pytest.raises(UserError, match="latin.txt' is not UTF-8"):
        train_bpe(str(tmp_path), 300, str(tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()


def test_a_tokenizer_file_that_cannot_be_used_is_an_error_that_names_it(bpe, tmp_path):
    with pytest.raises(UserError, match="data.tokenizer: cannot read '.*none.json': No such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    for name, data in {
        "a.json": b"{}",
        "b.json": b"not json",
        "c.json": b'{"model":{"type":7}}',
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"data.tokenizer: '.*{name}' is not a file of the"):
            load_tokenizer(str(tmp_path / name))
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="d.json': it is not UTF-8 text"):
        load_tokenizer(str(tmp_path / "d.json"))
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(UserError, match="has no token to put between.*add_special_tokens"):
        load_tokenizer(save(bare, tmp_path / "bare.json"))


@pytest.mark.parametrize("token", SEPARATORS)
def test_the_usual_end_of_document_tokens_separate_documents(bpe, folder, tmp_path, token):
    tokenizer = tokenizers.Tokenizer.from_str(
        pathlib.Path(bpe).read_text().replace(json.dumps(DOCUMENT_TOKEN), json.dumps(token))
    )
    loaded = JsonTokenizer(save(tokenizer, tmp_path / "t.json"))
    assert loaded.separator_token == token
    assert loaded.separator == tokenizer.token_to_id(token)
    assert (stream(folder, loaded)[0] == loaded.separator).sum() == 3


def test_the_first_end_of_document_token_of_the_list_is_the_separator(bpe, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(bpe)
    tokenizer.add_special_tokens(["</s>", "<|endoftext|>"])
    assert JsonTokenizer(save(tokenizer, tmp_path / "t.json")).separator_token == DOCUMENT_TOKEN


def sized(folder, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    parts = zip(*encode_sized(find_documents(str(folder)), tokenizer), strict=True)
    tokens, sizes = map(np.concatenate, parts)
    return tokens, sizes


def metaspace(vocab: list[str], **model) -> tokenizers.Tokenizer:
    """A tokenizer of characters as Llama 2 has it: not byte-level, with single bytes to fall
    back on."""
    tokens = ["</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *vocab]
    ids = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, **model)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_the_bytes_of_tokens_that_are_not_byte_strings_are_counted_in_the_text(tmp_path):
    (tmp_path / "text").mkdir()
    text = "a b\u00e9 \U0001f642ab\n"
    (tmp_path / "text" / "0.txt").write_text(text)
    (tmp_path / "text" / "1.txt").write_text("\u65e5a")
    path = save(metaspace(["a", "b", "\u2581", "\u00e9", "\n"]), tmp_path / "t.json")
    tokenizer = JsonTokenizer(path)
    assert not tokenizer.is_byte_level
    tokens, sizes = sized(tmp_path / "text", tokenizer)
    spelled = [tokenizer.token_text()[i] for i in tokens]
    # a, space, b, an e of two bytes, space, four bytes of a face, a, b, newline; the separator;
    # three bytes of a character, a.
    assert sizes.tolist() == [1, 1, 1, 2, 1, *[1] * 4, 1, 1, 1, 1, *[1] * 3, 1], spelled
    np.testing.assert_array_equal(tokens, stream(tmp_path / "text", tokenizer)[0])


def test_the_bytes_of_byte_level_tokens_add_up_to_the_text_of_each(folder, bpe):
    for tokenizer in (JsonTokenizer(bpe), ByteTokenizer()):
        tokens, sizes = sized(folder, tokenizer)
        np.testing.assert_array_equal(tokens, stream(folder, tokenizer)[0])
        np.testing.assert_array_equal(sizes, tokenizer.token_bytes()[tokens])
        assert sizes.sum() == stream(folder, tokenizer)[1]


def test_the_vocabulary_size_covers_the_largest_id(bpe, tmp_path):
    assert load_tokenizer(bpe).vocab_size == 300
    tokenizer = tokenizers.Tokenizer.from_file(bpe)
    tokenizer.add_tokens(["extra"])
    assert load_tokenizer(save(tokenizer, tmp_path / "t.json")).vocab_size == 301


def test_only_a_byte_level_tokenizer_maps_tokens_to_bytes(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({DOCUMENT_TOKEN: 0}, DOCUMENT_TOKEN))
    words.add_special_tokens([DOCUMENT_TOKEN])
    with pytest.raises(UserError, match="not byte-level"):
        load_tokenizer(save(words, tmp_path / "t.json")).token_bytes()


def test_train_bpe_refuses_small_vocabularies_and_existing_files(folder, bpe, tmp_path):
    with pytest.raises(UserError, match="vocab_size: 256 is below 257"):
        train_bpe(str(folder), 256, str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="out: '.*tokenizer.json' exists"):
        train_bpe(str(folder), 300, bpe)
    with pytest.raises(UserError, match="out: cannot write"):
        train_bpe(str(folder), 300, str(pathlib.Path(bpe) / "below_a_file.json"))
    assert train_bpe(str(folder), 257, str(tmp_path / "bytes.json")) == 257


@pytest.mark.parametrize(
    "vocab_size, name", [(256, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_ids_are_16_bits_wide_where_they_fit(vocab_size, name):
    assert token_dtype(vocab_size).name == name


def test_the_readable_texts_of_tokens_join_to_the_text_with_escapes(folder, bpe):
    plain = ByteTokenizer().token_text()
    assert len(plain) == 256
    assert [plain[byte] for byte in b"a \n\\\x00\xe9"] == ["a", " ", "\\n", "\\", "\\x00", "\\xe9"]
    tokenizer = JsonTokenizer(bpe)
    texts = tokenizer.token_text()
    assert len(texts) == tokenizer.vocab_size and texts[tokenizer.separator] == DOCUMENT_TOKEN
    ids = stream(folder, tokenizer)[0]
    joined = "".join(texts[i] for i in ids)
    assert joined.startswith(r"def f(x):\r\n\treturn  x  # ")
    assert all(text.isprintable() for text in texts)
