"""The tokenizer that `data.tokenizer` names."""

from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.interface import Tokenizer
from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.data.tokenizers.named import file_of, special_of
from moejax.data.tokenizers.sentencepiece_file import SUFFIX, SentencePieceTokenizer


def load_tokenizer(path: str, bos: str = "auto") -> Tokenizer:
    """The tokenizer of `data.tokenizer` and `data.bos`.

    Args:
      path: a tokenizer.json, a SentencePiece .model file, or a folder with one of them, whose
        tokenizer_config.json is then heeded; empty for bytes.
      bos: "auto" for the tokens that the tokenizer puts before a text as its `opening`; "none" for
        no opening.

    Raises:
      UserError: nothing there, or no tokenizer that can be used.
    """
    if not path:
        return ByteTokenizer()
    file, special = file_of(path), special_of(path)
    # A folder's name tells more than its file's, which is the same in every folder.
    name = file.name if str(file.name) in path else f"{file.parent.name}/{file.name}"
    kind = SentencePieceTokenizer if file.suffix == SUFFIX else JsonTokenizer
    return kind(str(file), special, opens=bos != "none", name=name)
