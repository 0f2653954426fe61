"""Tokenise once, read many times: text to memory-mapped token shards."""

import dataclasses
import os
import tempfile

from moejax.data.census import Census
from moejax.data.corpus import facts_of
from moejax.data.duplicates import overlap
from moejax.data.shards import (
    HELDOUT,
    SIZES,
    TRAIN,
    Index,
    fingerprint,
    is_prepared,
    map_tokens,
    write_index,
    write_tokens,
)
from moejax.data.split import Text, open_text
from moejax.data.tokenizer import (
    Tokenizer,
    before_documents,
    encode_documents,
    encode_sized,
    load_tokenizer,
    token_dtype,
)
from moejax.errors import UserError


def prepare(
    path: str,
    tokenizer: str,
    out_dir: str,
    eval_fraction: float = 0.05,
    eval_path: str = "",
    bos: str = "auto",
) -> Index:
    """Tokenise `path` into the new folder `out_dir`, for `data.path`; return its index.

    Args:
      path: a file or folder of text; empty for the built-in corpus.
      tokenizer: a tokenizer's file or folder, see `load_tokenizer`; empty for bytes as tokens.
      out_dir: the folder to make; it may exist if it is empty. It appears complete or not at all.
      eval_fraction: share of the bytes to hold out, in (0, 1).
      eval_path: a file or folder of text to hold out instead.
      bos: "auto" to begin documents with the tokenizer's opening, "none" for no opening.

    The text is read document by document, with one document in memory at a time. The shards are the
    same corpus, with the same fingerprint, as the text loaded with the same arguments.
    """
    out_dir = os.path.abspath(os.path.expanduser(out_dir))
    if path and is_prepared(os.path.expanduser(path)):
        raise UserError(f"path: {path!r} is already prepared; name the original text")
    text = open_text(path, eval_fraction, eval_path)
    loaded = load_tokenizer(tokenizer, bos)
    try:
        if os.path.lexists(out_dir) and (not os.path.isdir(out_dir) or os.listdir(out_dir)):
            raise UserError(
                f"out_dir: {out_dir!r} exists and is not an empty folder; choose another"
            )
        parent = os.path.dirname(out_dir)
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".prepare-") as temporary:
            folder = os.path.join(temporary, "shards")
            os.mkdir(folder)
            index = _write(folder, text, loaded, eval_fraction)
            os.rename(folder, out_dir)  # replaces an empty folder, fails on any other
    except OSError as error:
        raise UserError(f"out_dir: cannot write {out_dir!r}: {error.strerror}") from error
    return index


def _write(folder: str, text: Text, tokenizer: Tokenizer, eval_fraction: float) -> Index:
    dtype, census, split = token_dtype(tokenizer.vocab_size), Census(), text.split
    train, heldout, sizes = (os.path.join(folder, name) for name in (TRAIN, HELDOUT, SIZES))
    parts = encode_documents(split.train, tokenizer, census)
    train_tokens, train_bytes = write_tokens(train, parts)
    parts = encode_sized(split.heldout, tokenizer, census)
    heldout_tokens, heldout_bytes = write_tokens(heldout, parts, sizes)
    index = Index(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        opening=list(before_documents(tokenizer)),
        train_tokens=train_tokens,
        heldout_tokens=heldout_tokens,
        train_bytes=train_bytes,
        heldout_bytes=heldout_bytes,
        fingerprint=fingerprint(
            tokenizer.vocab_size, map_tokens(train, dtype), map_tokens(heldout, dtype)
        ),
        source=text.name,
        tokenizer=tokenizer.name,
        eval_fraction=eval_fraction,
        facts=dataclasses.asdict(facts_of(text, tokenizer, census)),
        overlap=dataclasses.asdict(overlap(split.train, split.heldout)),
    )
    write_index(folder, index)
    return index
