"""The held-out side of a stream: documents that are never trained on.

They are those of a text of their own (``data.eval_path``, or files with names such as ``val``), and
every document of the training text with the same bytes; or else a share of all documents, chosen by
a digest of their bytes, so that copies are on one side. No list of documents is kept: an evaluation
reads as many of them as it needs, from units in an order that depends on nothing but their number.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int64, UInt

from moejax.data.batches import endless_order
from moejax.data.stream.encode import Numbered, encoded, sized
from moejax.data.stream.units import Reader
from moejax.data.tokenizers.interface import SIZE, Tokenizer, joints, token_dtype
from moejax.errors import UserError

SALT = b"moejax stream 1"
ORDER = 0
"""Seed of the order in which documents for an evaluation are looked for: the same for every run."""
SPREAD = 16
"""Number of units among which the documents that are read at the start are spread."""
SAMPLE = 1 << 20
"""Tokens of training text that n-gram models and gates count, and that are in the fingerprint."""


def digest(data: bytes) -> bytes:
    """16 bytes that identify a document by its content."""
    return hashlib.blake2b(data, digest_size=16, salt=SALT).digest()


@dataclasses.dataclass(frozen=True)
class Sides:
    """The rule of the split.

    Attributes:
      train: the documents to train on, among them those of a share.
      heldout: the held-out documents; None for a share of ``train``.
      share: of the documents; 0.0 with documents of their own.
      rule: the rule in words.
      known: digests of held-out documents that are not trained on, where they are no share.
    """

    train: Reader
    heldout: Reader | None
    share: float
    rule: str
    known: frozenset[bytes] = frozenset()

    def is_held_out(self, data: bytes) -> bool:
        """True for a document of ``train`` that is left out of the training."""
        own = digest(data)
        return own in self.known or int.from_bytes(own[:8]) < self.share * 2**64


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """The documents of both sides that a run reads before it starts.

    Attributes:
      sides: the rule, with the digests of the held-out documents that were read.
      tokenizer: of all tokens.
      sample_N: the first tokens of the training text in a fixed order of its units.
      sample_start_D: where documents begin in them.
      heldout_N, heldout_size_M, heldout_start_D: tokens of the held-out documents that were read,
        the bytes of each token, and where the documents begin.
      complete: all held-out documents were read.
    """

    sides: Sides
    tokenizer: Tokenizer
    sample_N: UInt[np.ndarray, " N"]
    sample_start_D: Int64[np.ndarray, " D"]
    heldout_N: UInt[np.ndarray, " M"]
    heldout_size_M: UInt[np.ndarray, " M"]
    heldout_start_D: Int64[np.ndarray, " H"]
    complete: bool

    def fingerprint(self, options: object) -> str:
        """SHA-256 over options, names and sizes of all files, and the sample.

        Independent of how much is evaluated, and of every seed.
        """
        total = hashlib.sha256()
        sides = self.sides
        heldout = sides.heldout.texts.identity() if sides.heldout else sides.share
        about = [SALT.decode(), options, sides.train.texts.identity(), heldout]
        total.update(json.dumps(about, sort_keys=True).encode())
        total.update(self.sample_N.astype("<u4").data)
        first = self.heldout_N[: int([*self.heldout_start_D, len(self.heldout_N)][1])]
        total.update(first.astype("<u4").data)
        return total.hexdigest()


def survey(sides: Sides, tokenizer: Tokenizer, wanted: int) -> Survey:
    """Read held-out documents of at least ``wanted`` tokens, and a sample of the others.

    Raises:
      UserError: there are none on one of the sides.
    """
    reader = sides.heldout or sides.train

    def held_out(records: Iterable[Numbered], into: _Joined) -> Iterator[None]:
        for _, _, record in records:
            own = digest(record.data)
            if own not in into.digests and (sides.heldout or sides.is_held_out(record.data)):
                into.digests.add(own)
                into.add(*sized(record, tokenizer, reader.texts.field))
                yield

    def trained(records: Iterable[Numbered], into: _Joined) -> Iterator[None]:
        kept = (each for each in records if not sides.is_held_out(each.record.data))
        for document in encoded(kept, tokenizer, field):
            into.add(document.token_N)
            yield

    heldout, complete = _collect(reader, held_out, tokenizer, wanted)
    if not len(heldout):
        raise UserError(
            f"data.eval_path: {reader.texts.name!r} holds no text"
            if sides.heldout
            else f"data.eval_fraction={sides.share}: none of the documents of "
            f"{reader.texts.name!r} falls into this share; raise it, or name a text in "
            "data.eval_path"
        )
    if sides.heldout:
        sides = dataclasses.replace(sides, known=frozenset(heldout.digests))
    field = sides.train.texts.field
    sample, _ = _collect(sides.train, trained, tokenizer, SAMPLE)
    if not len(sample):
        raise UserError(
            f"{field}: {sides.train.texts.name!r} has no text to train on beside the held-out; "
            "give more text, or lower data.eval_fraction"
        )
    sample_N, _, sample_start_D = sample.arrays()
    return Survey(sides, tokenizer, sample_N, sample_start_D, *heldout.arrays(), complete)


def _collect(
    reader: Reader,
    take: Callable[[Iterable[Numbered], "_Joined"], Iterator[None]],
    tokenizer: Tokenizer,
    wanted: int,
) -> tuple["_Joined", bool]:
    """Documents of about ``wanted`` tokens from ``SPREAD`` units, or from more if need be.

    Units are read in an order that is the same for every run. Also returns whether all were read.

    Args:
      take: adds documents, and yields after each.
    """
    units = len(reader.texts)
    order = endless_order(units, ORDER)
    into = _Joined(tokenizer)
    for share in (-(-wanted // SPREAD), wanted):
        into = _Joined(tokenizer)
        for position in range(units):
            enough = min(len(into) + share, wanted)
            records = reader.read(int(order[position]))
            for _ in take((Numbered(position, *each) for each in records), into):
                if len(into) >= enough:
                    break
            if len(into) >= wanted:
                return into, False
    return into, True


class _Joined:
    """Documents joined to one stream, with what stands before and between them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._joint, self._between = joints(tokenizer)
        self._tokens: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._starts: list[int] = []
        self._length = 0
        self.digests: set[bytes] = set()

    def __len__(self) -> int:
        return self._length

    def add(self, token_N: np.ndarray, size_N: np.ndarray | None = None) -> None:
        joint, self._joint = self._joint, self._between
        opening = len(self._between.tokens) - 1
        self._tokens += [np.array(joint.tokens, self._dtype), token_N]
        self._sizes += [np.array(joint.sizes, SIZE)] + ([] if size_N is None else [size_N])
        self._starts.append(self._length + len(joint.tokens) - opening)
        self._length += len(joint.tokens) + len(token_N)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their sizes, and the starts of documents."""
        starts = np.array(self._starts, np.int64)
        return np.concatenate(self._tokens), np.concatenate(self._sizes), starts
