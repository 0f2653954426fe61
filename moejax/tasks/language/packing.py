"""Several documents in one row: the contract of packed batches, and rows made from documents.

A packed batch has, besides ``tokens`` int32[B, L + 1], ``valid`` bool[B, L] and ``row`` int32[B],

* ``segment`` int32[B, L]: the number of each input's document in its row, from 0. Attention, gates
  and positions restart with every document. The number of padding does not matter.

The last token of a document, its end-of-text token if it has one, is a target and no input: it is
not ``valid``, so that nothing predicts the first token of the next document from it, and no expert
is trained on it. A packed document then gives the logits, routing and losses of the same document
in a row of its own. Where documents begin with the token that they end with, one token serves both:
see `moejax.tasks.language.documents`, which makes such rows of a whole corpus.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from moejax.data.source import Batch


def packed(documents: Sequence[Integer[np.ndarray, " N"]], length: int) -> Batch:
    """Rows of ``length`` inputs, each with as many of the documents, in order, as fit.

    Raises:
      ValueError: a document without a target, or longer than a row.
    """
    rows: list[list[np.ndarray]] = []
    room = 0
    for number, document in enumerate(documents):
        if not 2 <= len(document) <= length + 1:
            raise ValueError(
                f"document {number} has {len(document)} tokens, but a row of {length} inputs takes "
                f"2 to {length + 1}; cut it or leave it out"
            )
        if len(document) > room:
            rows.append([])
            room = length + 1
        rows[-1].append(document)
        room -= len(document)
    tokens = np.zeros((len(rows), length + 1), np.int32)
    segment = np.zeros((len(rows), length + 1), np.int32)
    valid = np.zeros((len(rows), length + 1), bool)
    for row, members in enumerate(rows):
        start = 0
        for number, document in enumerate(members):
            end = start + len(document)
            tokens[row, start:end], segment[row, start:end] = document, number
            valid[row, start : end - 1] = True
            start = end
    row_B = np.arange(len(rows), dtype=np.int32)
    return {"tokens": tokens, "valid": valid[:, :-1], "segment": segment[:, :-1], "row": row_B}
