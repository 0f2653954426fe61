"""Training a byte-level BPE."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from moejax.data.census import Census
from moejax.data.documents import Piece
from moejax.data.load import Wanted, training_pieces
from moejax.data.tokenizers.interface import DOCUMENT_TOKEN, text_of
from moejax.errors import UserError


def train_bpe(
    path: str,
    vocab_size: int,
    out: str,
    *,
    eval_fraction: float = 0.05,
    eval_path: str = "",
    census: Census | None = None,
    **others: Any,
) -> int:
    """Train a byte-level BPE on the training split of `path` and write it to `out`.

    Args:
      path: files of UTF-8 text or of records; empty for the built-in corpus.
      vocab_size: size of the vocabulary, including the 256 bytes and `<|doc|>`; at least 257.
      out: the JSON file to write, for `data.tokenizer`. Must not exist.
      eval_fraction: share of the bytes to hold out; use the same in `data.eval_fraction`.
      eval_path: a text to hold out instead, as in `data.eval_path`.
      census: counts the documents as they are read.
      others: further fields of `moejax.data.load.Wanted`, such as the name of the text's column.

    Returns the size of the vocabulary, less than `vocab_size` if the text has too few pairs to
    merge. The tokenizer encodes any UTF-8 text without loss; bytes that are not UTF-8 raise
    UserError, in training and in encoding.
    """
    out = os.path.expanduser(out)
    if vocab_size < 257:
        raise UserError(f"vocab_size: {vocab_size} is below 257 (256 bytes and {DOCUMENT_TOKEN})")
    if os.path.exists(out):
        raise UserError(f"out: {out!r} exists; remove it or choose another name")
    train = training_pieces(Wanted(path, "", eval_fraction, eval_path, **others))
    tokenizer = _fit_bpe(train, vocab_size, census)
    folder = os.path.dirname(os.path.abspath(out))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
            partial = os.path.join(temporary, "tokenizer.json")
            with open(partial, "w", encoding="utf-8") as file:
                file.write(tokenizer.to_str(pretty=True))
            os.replace(partial, out)
    except OSError as error:
        raise UserError(f"out: cannot write {out!r}: {error.strerror}") from error
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _fit_bpe(pieces: Iterable[Piece], vocab_size: int, census: Census | None) -> Any:
    import tokenizers  # only where a tokenizer file is used

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for piece in pieces:
            if census is not None:
                census.add(piece)
            yield text_of(piece)

    tokenizer.train_from_iterator(texts(), trainer=trainer)
    return tokenizer
