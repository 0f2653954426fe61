"""Text that is read while it is trained on: ``data.stream``, and data sets of the hub."""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64, Integer

from moejax.config import Config
from moejax.data.batches import endless_order
from moejax.data.corpus import Corpus, Facts, Origin
from moejax.data.hub import PREFIX, HubUnits, is_hub
from moejax.data.paths import expand
from moejax.data.shards import is_prepared
from moejax.data.split import check_fraction, named_sides
from moejax.data.stream.batches import StreamBatches, as_place
from moejax.data.stream.blocks import Blocks, Rows, rows_of_block
from moejax.data.stream.encode import Encoded, Numbered, encoded
from moejax.data.stream.sides import Sides, Survey, survey
from moejax.data.stream.units import FileUnits, Reader, Units
from moejax.data.tokenizers.interface import before_documents, joints
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from moejax.tasks.language.remarks import FEW, few_held_out
from moejax.tasks.language.rows import train_rows
from moejax.tasks.language.source import TextSource


def is_stream(data: Any) -> bool:
    """True if the section ``data`` of a config asks for a stream."""
    return data.stream or is_hub(data.path)


def open_stream(config: Config) -> "StreamSource":
    """The stream of a config.

    Raises:
      UserError: see ``survey_of``.
    """
    found, train = survey_of(config), config.train
    return StreamSource(
        corpus_of(found),
        train.seq_len,
        train.batch_size,
        train.seed,
        train.eval_rows,
        packing=config.data.packing,
        survey=found,
    )


def survey_of(config: Config) -> Survey:
    """Reads the held-out documents of an evaluation, and a sample of the others.

    Raises:
      UserError: text or tokenizer that cannot be read, or fields that do not go together.
    """
    data = config.data
    _check(data)
    reader = functools.partial(
        Reader, skip=data.on_error == "skip", utf8=bool(data.tokenizer), report=_Report()
    )
    train, heldout, rule = _texts(data)
    sides = Sides(
        reader(train),
        reader(heldout) if heldout else None,
        0.0 if heldout else data.eval_fraction,
        rule,
    )
    tokenizer = load_tokenizer(data.tokenizer, data.bos)
    return survey(sides, tokenizer, config.train.eval_rows * config.train.seq_len + 1)


def corpus_of(found: Survey) -> Corpus:
    """The part of a stream that is in memory, as a corpus: its ``train_N`` is the sample."""
    tokenizer = found.tokenizer
    skips = found.sides.train.skip
    about = [tokenizer.name, tokenizer.vocab_size, joints(tokenizer), "skip" if skips else "fail"]
    return Corpus(
        train_N=found.sample_N,
        heldout_N=found.heldout_N,
        vocab_size=tokenizer.vocab_size,
        heldout_size_M=found.heldout_size_M,
        fingerprint=found.fingerprint(about),
        name=found.sides.train.texts.name,
        separator=tokenizer.separator,
        facts=Facts(
            split=found.sides.rule,
            heldout_documents=len(found.heldout_start_D),
            separator=tokenizer.separator_token,
            opening=tokenizer.decode(before_documents(tokenizer)),
        ),
        origin=Origin(None, tokenizer),
        opening=before_documents(tokenizer),
        train_start_D=found.sample_start_D,
        heldout_start_D=found.heldout_start_D,
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StreamSource(TextSource):
    """Rows made of a stream of documents while they are trained on.

    ``corpus`` has the held-out side, and as its training side a sample that n-gram models and gates
    count.
    """

    survey: Survey

    @functools.cached_property
    def train(self) -> StreamBatches:  # pyright: ignore[reportIncompatibleVariableOverride]
        before = np.array(joints(self.survey.tokenizer)[1].tokens)
        make = _MakeRows(self.corpus, self.seq_len, self.packing)
        whole = self.packing != "none"
        blocks = Blocks(self.documents, before, self.seq_len, make, whole)
        return StreamBatches(blocks, self.batch_size, self.seed)

    @property
    def documents(self) -> "TrainDocuments":
        return TrainDocuments(self.survey, self.seed)

    def size(self) -> tuple[int | None, int]:
        return None, self.corpus.heldout_N.size

    def position(self, step: int) -> Any:
        """See `moejax.data.source.Positioned`."""
        return list(self.train.place(step))

    def resume(self, position: Any) -> None:
        """See `moejax.data.source.Positioned`."""
        place = as_place(position)
        if place is not None:
            self.train.learn(place)

    def about(self) -> dict[str, Any]:
        """The split, the evaluated rows, and the order."""
        units, facts = self.survey.sides.train.texts, self.corpus.facts
        text = {
            "split": facts.split,
            "heldout_documents": facts.heldout_documents,
            "heldout_tokens": len(self.corpus.heldout_N),
            "separator": facts.separator,
            "opening": facts.opening,
            "stream": {"units": len(units), "bytes": units.size, "order": self._order},
        }
        packed = self._packed()
        return {
            "text": text,
            "evaluated": self.evaluated,
            **({"packing": packed} if packed else {}),
        }

    @property
    def _order(self) -> str:
        units = self.survey.sides.train.texts
        what = "files and their parts" if isinstance(units, FileUnits) else "shards"
        return f"{what} shuffled, then rows within blocks of {rows_of_block(self.seq_len)}"

    def facts(self) -> dict[str, str]:
        """See `moejax.data.source.Remarks`."""
        units, facts, evaluated = self.survey.sides.train.texts, self.corpus.facts, self.evaluated
        size = f", {units.size / 1e6:.1f} MB" if units.size else ""
        read = "all" if self.survey.complete else "as many as an evaluation needs"
        lines = {
            "stream": f"{', '.join(units.formats)} in {len(units)} parts{size}",
            "order": self._order,
            "held out": f"{facts.split}, never trained on; {facts.heldout_documents} documents "
            f"were read, {read}",
            "evaluation": f"{evaluated['rows']} rows, {evaluated['tokens']} tokens, "
            f"{evaluated['bytes']} bytes of the {len(self.corpus.heldout_N)} tokens read",
        }
        if packed := self._packed().get("train"):
            share = f"{packed['padding']:.1%}"
            lines["packing"] = f"{self.packing}: {share} of the slots of a sample are padding"
        if facts.separator and self.corpus.vocab_size != 256:
            opening = f", {facts.opening} before each" if facts.opening else ""
            lines["separator"] = f"{facts.separator} between documents{opening}"
        return lines

    def warnings(self) -> list[str]:
        tokens = len(self.corpus.heldout_N)
        return [few_held_out(tokens)] if tokens < FEW and self.survey.complete else []


# These do not refer to the source: the thread that reads ahead would keep it alive, and the source
# the thread.


@dataclasses.dataclass(frozen=True, eq=False)
class TrainDocuments:
    """The documents that are trained on, in the order of each epoch."""

    survey: Survey
    seed: int

    def __call__(self, epoch: int, unit: int, number: int) -> Iterator[Encoded]:
        """Those of an epoch from a place on: see `moejax.data.stream.blocks.Documents`."""
        reader = self.survey.sides.train
        records = self._records(epoch, unit, number)
        return encoded(records, self.survey.tokenizer, reader.texts.field)

    def _records(self, epoch: int, unit: int, number: int) -> Iterator[Numbered]:
        sides = self.survey.sides
        units = len(sides.train.texts)
        order = endless_order(units, self.seed)
        for position in range(unit, units):
            first = number if position == unit else 0
            for own, record in sides.train.read(int(order[epoch * units + position]), first):
                if not sides.is_held_out(record.data):
                    yield Numbered(position, own, record)


@dataclasses.dataclass(frozen=True, eq=False)
class _MakeRows:
    """Rows of a block, which stands in for the training side of a corpus."""

    corpus: Corpus
    seq_len: int
    packing: str

    def __call__(
        self, tokens_N: Integer[np.ndarray, " N"], start_D: Int64[np.ndarray, " D"]
    ) -> Rows:
        block = dataclasses.replace(self.corpus, train_N=tokens_N, train_start_D=start_D)
        return train_rows(block, self.seq_len, self.packing)


class _Report:
    """Lines about records that are left out: the first, and then ever fewer of them.

    One process prints them; all read the same.
    """

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, problem: str) -> None:
        self._count += 1
        if self._count & (self._count - 1) == 0 and jax.process_index() == 0:
            print(
                f"moejax: warning: data.on_error=skip: {self._count} record(s) left out so far, "
                f"the last one {problem}",
                file=sys.stderr,
                flush=True,
            )


def _texts(data: Any) -> tuple[Units, Units | None, str]:
    """The documents to train on, the held-out ones where they are others, and the rule in words."""
    heldout = _open(data.eval_path, data.text_field, "data.eval_path") if data.eval_path else None
    if heldout:
        return _open(data.path, data.text_field, "data.path"), heldout, "data.eval_path"
    if not is_hub(data.path):
        sides = named_sides(expand(data.path, "data.path"))
        if sides:
            name = _name(data.path)
            train, held = (
                FileUnits(files, data.text_field, name) for files in (sides.train, sides.heldout)
            )
            return train, held, sides.rule
    check_fraction(data.eval_fraction)
    rule = f"{100 * data.eval_fraction:.3g}% of the documents, by a digest of their bytes"
    return _open(data.path, data.text_field, "data.path"), None, rule


def _open(path: str, text_field: str, field: str) -> Units:
    if is_hub(path):
        return HubUnits(path, text_field, field)
    return FileUnits(expand(path, field), text_field, _name(path))


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def _check(data: Any) -> None:
    """Refuses what streams cannot do."""
    for field, unset in (("mixture", ""),):
        if data[field] != unset:
            raise UserError(
                f"data.{field}={data[field]!r} does not go with a stream (data.stream=True, or "
                f"{PREFIX} in data.path); use data.{field}={unset}, or prepare the text (moejax "
                "data prepare)"
            )
    if not data.path:
        raise UserError(
            "data.stream=True: the built-in text fits into memory; use data.stream=False, or name "
            "a text in data.path"
        )
    if is_prepared(os.path.expanduser(data.path)):
        raise UserError(
            f"data.stream=True: the tokens in {data.path!r} are not read into memory anyway; use "
            "data.stream=False"
        )
