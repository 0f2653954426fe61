"""Folders of Hugging Face as tokenizers: their files, and the special tokens that they name."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.sentencepiece_file import SentencePieceTokenizer
from moejax.errors import UserError
from moejax.hf.fields import config_of
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.task import LanguageModel, build
from tests.data.test_sentencepiece import piece, trained

TEXT = "the router — sends\n a  token 🙂 </s>"
NAMED = ("<s>", "</s>", "<|end|>", "<pad>")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A byte-level BPE whose own file puts <s> before a text, and nothing beside it."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the router sends"], vocab_size=280, special_tokens=[*NAMED])
    whole = tokenizers.Tokenizer.from_str(bpe.to_str())
    whole.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path / "model"
    path.mkdir()
    whole.save(str(path / "tokenizer.json"))
    return path


def write(folder: pathlib.Path, name: str, keys) -> None:
    (folder / name).write_text(json.dumps(keys), encoding="utf-8")


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


@pytest.mark.parametrize(
    ("files", "separator", "opening"),
    [
        ({}, "</s>", "<s>"),
        ({CONFIG: {}}, "</s>", "<s>"),
        ({CONFIG: {"eos_token": "<|end|>"}}, "<|end|>", "<s>"),
        ({CONFIG: {"eos_token": {"content": "<|end|>", "lstrip": False}}}, "<|end|>", "<s>"),
        ({CONFIG: {"eos_token": None}, MAP: {"eos_token": "<|end|>"}}, "<|end|>", "<s>"),
        ({CONFIG: {"eos_token": "</s>"}, MAP: {"eos_token": "<|end|>"}}, "</s>", "<s>"),
        ({CONFIG: {"eos_token": "<nowhere>"}}, "</s>", "<s>"),
        # A tokenizer.json says itself what begins a text.
        ({CONFIG: {"add_bos_token": False, "bos_token": "<s>"}}, "</s>", "<s>"),
        ({CONFIG: {"add_bos_token": True, "bos_token": "<pad>"}}, "</s>", "<s>"),
    ],
)
def test_a_folder_names_its_separator_and_its_file_what_begins_a_text(
    folder, files, separator, opening
):
    for name, keys in files.items():
        write(folder, name, keys)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.separator_token == separator == tokenizer.decode([tokenizer.separator])
    assert tokenizer.decode(tokenizer.opening) == opening
    assert load_tokenizer(str(folder), bos="none").opening == ()
    assert tokenizer.name == "model/tokenizer.json"


def test_a_single_file_is_read_without_its_neighbours(folder):
    write(folder, CONFIG, {"eos_token": "<|end|>", "add_bos_token": False})
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert (tokenizer.separator_token, tokenizer.opening) == ("</s>", (0,))
    assert tokenizer.name == "tokenizer.json"


def test_an_opening_counts_no_bytes_and_its_spelling_in_a_text_is_text(folder):
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode([piece("<s>" + TEXT)])[0]
    assert tokenizer.separator not in ids and tokenizer.opening[0] not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(("<s>" + TEXT).encode())
    assert tokenizer.token_bytes()[list(tokenizer.opening)].tolist() == [0]


def test_an_end_of_text_that_the_file_calls_an_ordinary_token_is_not_found_in_a_text(folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(["<turn>"])
    library.save(str(folder / "tokenizer.json"))
    assert library.token_to_id("<turn>") in library.encode("a<turn>b").ids
    write(folder, CONFIG, {"eos_token": "<turn>"})
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.separator == library.token_to_id("<turn>")
    ids = tokenizer.encode([piece("a<turn>b")])[0].tolist()
    assert tokenizer.separator not in ids and tokenizer.decode(ids) == "a<turn>b"
    assert tokenizer.vocab_size == library.get_vocab_size()


@pytest.mark.parametrize("kind", ["folder", "sentencepiece"])
def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(folder, tmp_path, kind):
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("the router sends a token " * (i + 9))
    path = trained(tmp_path / "a.model") if kind == "sentencepiece" else str(folder)
    size = load_tokenizer(path).vocab_size
    fields = {"data.path": str(tmp_path / "text"), "data.tokenizer": path, "train.seq_len": 8}
    with pytest.raises(UserError, match=f"model.vocab_size={size - 1} is smaller than .* {size};"):
        build(config_of({**fields, "model.vocab_size": size - 1}))
    task, source = build(config_of({**fields, "model.vocab_size": size + 7}))
    assert isinstance(source, TextSource) and source.corpus.vocab_size == size
    assert isinstance(task, LanguageModel) and task.model.vocab_size == size + 7
    task, _ = build(config_of(fields))
    assert isinstance(task, LanguageModel) and task.model.vocab_size == size


def test_a_folder_with_a_sentencepiece_model_alone_is_read_from_it(tmp_path, folder):
    model = tmp_path / "sp"
    model.mkdir()
    trained(model / "tokenizer.model")
    tokenizer = load_tokenizer(str(model))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.name, tokenizer.opening) == ("sp/tokenizer.model", (1,))
    write(model, CONFIG, {"add_bos_token": False})
    assert load_tokenizer(str(model)).opening == ()
    write(model, CONFIG, {"add_bos_token": True, "bos_token": {"content": "<s>"}})
    assert load_tokenizer(str(model)).opening == (1,)
    # The unknown token is no control token: it would be in texts too.
    write(model, CONFIG, {"eos_token": "<unk>"})
    assert load_tokenizer(str(model)).separator_token == "</s>"
    (model / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(str(model)), JsonTokenizer)


def test_a_folder_without_a_tokenizer_or_with_damaged_files_is_an_error_that_names_it(folder):
    with pytest.raises(UserError, match="holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(folder.parent))
    for content, problem in (("{", "cannot be read"), ("[]", "is no JSON object")):
        (folder / CONFIG).write_text(content)
        with pytest.raises(UserError, match=f"data.tokenizer: '.*{CONFIG}' {problem}"):
            load_tokenizer(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<s>"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
            "add_bos_token": True,
        },
        {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
            "add_bos_token": False,
        },
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>",
            "add_bos_token": False,
        },
    ],
    ids=str,
)  # fmt: skip
def test_a_folder_has_the_tokens_of_transformers(folder, keys):
    transformers = pytest.importorskip("transformers")
    write(folder, CONFIG, keys)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer(str(folder))
    text = TEXT.removesuffix(" </s>")  # there, the spelling of a special token is that token
    ids = ours.encode([piece(text)])[0].tolist()
    assert [*ours.opening, *ids] == theirs(text).input_ids
    assert ours.separator == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("adds", [True, False])
def test_a_sentencepiece_folder_has_the_tokens_of_transformers(tmp_path, adds):
    transformers = pytest.importorskip("transformers")
    trained(tmp_path / "tokenizer.model", model_type="bpe")
    write(tmp_path, CONFIG, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": adds})
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = load_tokenizer(str(tmp_path))
    text = "the router sends"
    ids = ours.encode([piece(text)])[0].tolist()
    assert [*ours.opening, *ids] == theirs(text).input_ids
    assert ours.separator == theirs.eos_token_id
