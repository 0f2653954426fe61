"""Tokenise once, read many times: text to memory-mapped token shards, in several processes.

Every unit of work leaves its tokens in files of a hidden folder beside the shards, under a key made
of all that they depend on. A preparation that was killed therefore continues where it stopped. At
the end the documents are chosen and the streams are written, a chunk at a time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from moejax.data.assemble import Choice, Listed, choose, size_parts, starts, token_parts
from moejax.data.chunks import StoredChunks, is_done, write_unit
from moejax.data.duplicates import overlap
from moejax.data.encode import Reading, encode_unit
from moejax.data.load import Wanted, corpus_of_shards, facts_of, kept_split, size_table
from moejax.data.shards import (
    HELDOUT,
    HELDOUT_STARTS,
    SIZES,
    STARTS,
    TRAIN,
    TRAIN_STARTS,
    Index,
    fingerprint_of_digests,
    map_shards,
    write_array,
    write_index,
)
from moejax.data.token_overlap import token_overlap
from moejax.data.tokenizers.interface import Tokenizer, joints, token_dtype
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.named import tokenizer_digest
from moejax.data.unfinished import remove_others, working_folder
from moejax.data.units import Texts, Unit, weights_of
from moejax.data.workers import in_processes
from moejax.errors import UserError

CHUNKS = "moejax chunks 1"
"""The version of the files of unfinished preparations."""
Progress = Callable[[int, int], None]
"""Called with the bytes of input that are done, and of all input."""


def prepare(
    path: str,
    tokenizer: str,
    out_dir: str,
    eval_fraction: float = 0.05,
    eval_path: str = "",
    *,
    workers: int = 1,
    licence: str = "",
    progress: Progress = lambda done, total: None,
    **others: Any,
) -> Index:
    """Tokenise `path` into the new folder `out_dir`, for `data.path`; return its index.

    Args:
      path: files of text or records; empty for the built-in corpus.
      tokenizer: a tokenizer's file or folder, see `load_tokenizer`; empty for bytes as tokens.
      out_dir: the folder to make; it may exist if it is empty. It appears complete or not at all.
      eval_fraction: share of the text to hold out, in (0, 1).
      eval_path: files to hold out instead.
      workers: number of processes. More than one need a script whose main part is guarded by
        ``if __name__ == "__main__"``, as everywhere in Python.
      licence: a note about the text's licence, kept in the index.
      others: further fields of `Wanted`, as in the section `data` of a config.

    Memory holds a few chunks of text, and 33 bytes for each document, about three times as much
    while their sides are chosen. The shards are the same corpus, with the same fingerprint, as the
    text loaded with the same arguments.

    Raises:
      UserError: text, tokenizer or folder that cannot be used, or a process that was killed.
    """
    wanted = Wanted(path, tokenizer, eval_fraction, eval_path, **others)
    out_dir = os.path.abspath(os.path.expanduser(out_dir))
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1 process")
    try:
        if os.path.lexists(out_dir) and (not os.path.isdir(out_dir) or os.listdir(out_dir)):
            raise UserError(
                f"out_dir: {out_dir!r} exists and is not an empty folder; choose another"
            )
        loaded = load_tokenizer(tokenizer, wanted.bos)
        texts = wanted.texts()
        with working_folder(out_dir) as folder:
            keys = unit_keys(texts, wanted)
            remove_others(folder, keys)
            _encode_all(folder, texts, keys, wanted, workers, progress)
            if unit_keys(texts, wanted) != keys:
                raise UserError(f"data.path: {texts.name!r} was changed meanwhile; run again")
            shards = os.path.join(folder, "shards")
            os.mkdir(shards)
            index = _write(shards, StoredChunks(folder, keys), texts, loaded, wanted, licence)
            os.rename(shards, out_dir)  # replaces an empty folder, fails on any other
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"out_dir: cannot write {out_dir!r}: {why}") from error
    return index


def unit_keys(texts: Texts, wanted: Wanted) -> tuple[str, ...]:
    """A name for the tokens of each unit, which changes with all that they depend on."""
    common = [CHUNKS, wanted.text_field, wanted.bos, tokenizer_digest(wanted.tokenizer)]
    keys = []
    for unit in texts.units:
        files = [(f.path, f.start, f.size, os.stat(f.path).st_mtime_ns) for f in unit.files]
        kind = unit.format.name if unit.format else "text"
        parts = repr([common, unit.side, files, kind, unit.spans])
        digest = hashlib.sha256(parts.encode("utf-8", "surrogateescape"))
        keys.append(digest.hexdigest()[:24])
    return tuple(keys)


def _encode_all(
    folder: str,
    texts: Texts,
    keys: tuple[str, ...],
    wanted: Wanted,
    workers: int,
    progress: Progress,
) -> None:
    """Write the chunks of all units that are not there yet."""
    weights = weights_of(texts.units)
    todo = [i for i, key in enumerate(keys) if not is_done(folder, key, wanted.on_error)]
    total = sum(weights)
    done = total - sum(weights[i] for i in todo)
    progress(done, total)
    jobs = [(keys[i], texts.units[i]) for i in todo]
    encode = functools.partial(_encode, folder, wanted.reading)
    load = functools.partial(_load, wanted.tokenizer, wanted.bos)
    several = min(workers, len(jobs)) > 1
    finished = in_processes(encode, jobs, workers, load) if several else _here(encode, jobs, load)
    with contextlib.closing(finished):
        for number in finished:
            done += weights[todo[number]]
            progress(done, total)


def _here(
    encode: Callable[[Any], None], jobs: Sequence[Any], load: Callable[..., None]
) -> Generator[int]:
    """Do the jobs in this process; yield the number of each when it is done."""
    load(threads=True)
    for number, job in enumerate(jobs):
        encode(job)
        yield number


_TOKENIZER: Tokenizer | None = None
"""The tokenizer of this process."""


def _load(tokenizer: str, bos: str, threads: bool = False) -> None:
    global _TOKENIZER
    if not threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    _TOKENIZER = load_tokenizer(tokenizer, bos)


def _encode(folder: str, reading: Reading, job: tuple[str, Unit]) -> None:
    assert _TOKENIZER is not None
    key, unit = job
    write_unit(folder, key, encode_unit(unit, _TOKENIZER, reading))


def _write(
    folder: str,
    chunks: StoredChunks,
    texts: Texts,
    tokenizer: Tokenizer,
    wanted: Wanted,
    licence: str,
) -> Index:
    """Write the shards and their index."""
    bare = dataclasses.replace(chunks, tokens=False)
    listed = Listed.of(bare)
    choice = choose(listed, texts.share, texts.count, wanted.drops_copies)
    _, between = joints(tokenizer)
    paths = {n: os.path.join(folder, n) for n in (TRAIN, HELDOUT, SIZES)}
    train = write_array(paths[TRAIN], token_parts(chunks, choice.train_D, between.tokens))
    heldout = write_array(paths[HELDOUT], token_parts(chunks, choice.heldout_D, between.tokens))
    sizes = size_parts(chunks, choice.heldout_D, between.sizes, size_table(tokenizer))
    write_array(paths[SIZES], sizes)
    for name, kept_D in ((TRAIN_STARTS, choice.train_D), (HELDOUT_STARTS, choice.heldout_D)):
        start_D = starts(listed.length_D[kept_D], len(between.tokens))
        write_array(os.path.join(folder, name), [start_D.astype(STARTS)])
    dtype = token_dtype(tokenizer.vocab_size)
    index = Index(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        opening=list(joints(tokenizer)[0].tokens),
        train_tokens=train.count,
        heldout_tokens=heldout.count,
        train_bytes=_bytes(listed, choice.train_D),
        heldout_bytes=_bytes(listed, choice.heldout_D),
        fingerprint=fingerprint_of_digests(tokenizer.vocab_size, train.digest, heldout.digest),
        source=texts.name,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer_digest(wanted.tokenizer),
        eval_fraction=wanted.eval_fraction,
        licence=licence,
        facts=dataclasses.asdict(facts_of(texts, tokenizer, choice, bare, wanted.reading)),
        overlap={},
    )
    index = dataclasses.replace(index, overlap=_overlap(folder, index, texts, tokenizer, choice))
    write_index(folder, index)
    return index


def _bytes(listed: Listed, kept_D: np.ndarray) -> int:
    """Bytes of a stream's text, separators included."""
    return int(listed.size_D[kept_D].sum() + np.sum(kept_D) - 1)


def _overlap(
    folder: str, index: Index, texts: Texts, tokenizer: Tokenizer, choice: Choice
) -> dict[str, Any]:
    split = kept_split(texts.split, choice)
    if split is not None:
        return dataclasses.asdict(overlap(split.train, split.heldout))
    found = token_overlap(corpus_of_shards(map_shards(folder, index)), tokenizer)
    return dataclasses.asdict(found) if found else {}
