"""Documents of plain text as one stream of tokens."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt

from moejax.data.census import Census
from moejax.data.documents import Document, Piece, piece_batches
from moejax.data.tokenizers.interface import SIZE, Joint, Tokenizer, joints, token_dtype


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None = None
) -> Iterator[tuple[UInt[np.ndarray, " N"], int]]:
    """The token stream of the documents, in parts, each with the number of bytes that it encodes.

    A `census` counts the documents as they are read.
    """
    for part, tokens in _parts(documents, tokenizer, census):
        yield tokens, sum(part.sizes) if isinstance(part, Joint) else len(part.data)


def encode_sized(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None = None
) -> Iterator[tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " N"]]]:
    """The same stream; each part with the number of bytes that each of its tokens encodes."""
    for part, tokens in _parts(documents, tokenizer, census):
        known = isinstance(part, Joint)
        yield tokens, np.array(part.sizes, SIZE) if known else tokenizer.sizes(part, tokens)


def _parts(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None
) -> Iterator[tuple[Piece | Joint, np.ndarray]]:
    """Pieces with their tokens, and what stands before and between the documents."""
    dtype = token_dtype(tokenizer.vocab_size)
    first, between = joints(tokenizer)
    joint = first
    for batch in piece_batches(documents):
        for piece, tokens in zip(batch, tokenizer.encode(batch), strict=True):
            if piece.is_first and joint.tokens:
                yield joint, np.array(joint.tokens, dtype=dtype)
            joint = between
            if census is not None:
                census.add(piece)
            yield piece, tokens.astype(dtype)
