"""The tokenizer that `data.tokenizer` names."""

from pathlib import Path

from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.interface import Tokenizer
from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.data.tokenizers.named import SUFFIX, file_of, special_of
from moejax.data.tokenizers.sentencepiece_file import SentencePieceTokenizer


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
    # All folders' files have the same name.
    name = f"{file.parent.name}/{file.name}" if Path(path).expanduser().is_dir() else file.name
    kind = SentencePieceTokenizer if file.suffix == SUFFIX else JsonTokenizer
    return kind(str(file), special, opens=bos != "none", name=name)
