"""A converted model's prompts open, and its texts end, as its own files say."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from moejax.generate.load import ends_of
from moejax.generate.run import encoded


@pytest.fixture
def folder(tmp_path):
    """A tokenizer that puts <s> before and </s> behind a text."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a b"], vocab_size=270, special_tokens=["<s>", "</s>", "<|end|>"])
    whole = tokenizers.Tokenizer.from_str(bpe.to_str())
    whole.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    whole.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_prompt_opens_as_the_tokenizers_file_says_and_never_closes(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = plain.encode("a b a").ids[:-1]
    np.testing.assert_array_equal(encoded(tokenizer, "a b a", "--prompt"), wanted)
    assert wanted[0] == 0 and tokenizer.opening == (0,)
    assert ByteTokenizer().opening == ()
    bare = load_tokenizer(str(folder / "tokenizer.json"), bos="none")
    np.testing.assert_array_equal(encoded(bare, "a b a", "--prompt"), wanted[1:])


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (1,)),  # the separator of documents: the first known one, </s>
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {}}, (2,)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": 1}}, (1,)),
        ({"generation_config.json": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"config.json": {"eos_token_id": None}}, (1,)),
    ],
)  # fmt: skip
def test_a_text_ends_as_the_models_files_say_and_otherwise_with_the_separator(folder, files, ends):
    for name, keys in files.items():
        (folder / name).write_text(json.dumps(keys))
    path = str(folder / "tokenizer.json")
    assert ends_of(path, load_tokenizer(path)) == ends
    assert ends_of(str(folder), load_tokenizer(str(folder))) == ends
    assert ends_of("", ByteTokenizer()) == (0,)


@pytest.mark.parametrize("text", ["[", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": -1}'])
def test_a_file_without_numbers_of_tokens_is_refused_by_name(folder, text):
    (folder / "generation_config.json").write_text(text)
    path = str(folder / "tokenizer.json")
    with pytest.raises(UserError, match="generation_config.json"):
        ends_of(path, load_tokenizer(path))
