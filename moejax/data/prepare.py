"""Tokenise once, read many times: text to memory-mapped token shards, in several processes.

Every unit of work leaves its tokens in files of a hidden folder beside the shards, under a key made
of all that they depend on. A preparation that was killed therefore goes on where it stopped. At the
end the documents are chosen and the streams are written, a chunk at a time.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
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
    fingerprint,
    is_prepared,
    map_shards,
    map_tokens,
    write_array,
    write_index,
)
from moejax.data.token_overlap import token_overlap
from moejax.data.tokenizers.interface import Tokenizer, joints, token_dtype
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.named import file_of
from moejax.data.units import Texts, Unit
from moejax.errors import UserError

WORTH_KEEPING = 256 << 20
"""Bytes of unfinished work that outlive a failure; less is made again in seconds."""
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

    Memory holds a few chunks of text, and 33 bytes for each document. The shards are the same
    corpus, with the same fingerprint, as the text loaded with the same arguments.

    Raises:
      UserError: text, tokenizer or folder that cannot be used, or a process that was killed.
    """
    wanted = Wanted(path, tokenizer, eval_fraction, eval_path, **others)
    out_dir = os.path.abspath(os.path.expanduser(out_dir))
    if path and is_prepared(os.path.expanduser(path)):
        raise UserError(f"path: {path!r} is already prepared; name the original text")
    if workers < 1:
        raise UserError(f"workers: {workers} must be at least 1")
    texts, loaded = wanted.texts(), load_tokenizer(tokenizer, wanted.bos)
    try:
        if os.path.lexists(out_dir) and (not os.path.isdir(out_dir) or os.listdir(out_dir)):
            raise UserError(
                f"out_dir: {out_dir!r} exists and is not an empty folder; choose another"
            )
        with _working_folder(out_dir) as folder:
            keys = tuple(unit_key(unit, wanted) for unit in texts.units)
            _encode_all(folder, texts, keys, wanted, workers, progress)
            shards = os.path.join(folder, "shards")
            shutil.rmtree(shards, ignore_errors=True)
            os.mkdir(shards)
            index = _write(shards, StoredChunks(folder, keys), texts, loaded, wanted, licence)
            os.rename(shards, out_dir)  # replaces an empty folder, fails on any other
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"out_dir: cannot write {out_dir!r}: {error.strerror}") from error
    return index


@contextlib.contextmanager
def _working_folder(out_dir: str) -> Iterator[str]:
    """The hidden folder of a preparation, for one process at a time. After a failure it stays if
    what is in it took long to make; after a kill it stays anyway."""
    parent, name = os.path.split(out_dir)
    missing = [p for p in (Path(parent), *Path(parent).parents) if not p.exists()]
    os.makedirs(parent, exist_ok=True)
    folder = os.path.join(parent, f".{name}.unfinished")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(os.path.join(folder, "lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"out_dir: another process is preparing {out_dir!r}; wait for it, or choose "
                    "another folder"
                ) from error
            yield folder
    except UserError as error:
        if _size(folder) < WORTH_KEEPING:
            raise
        raise UserError(
            f"{error} (what is done is kept in {folder!r}; the same command goes on from there)"
        ) from error
    finally:
        if os.path.isdir(folder) and _size(folder) < WORTH_KEEPING:
            shutil.rmtree(folder)
            for made in missing:
                with contextlib.suppress(OSError):  # something else is in it by now
                    made.rmdir()


def _size(folder: str) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def unit_key(unit: Unit, wanted: Wanted) -> str:
    """A name for the tokens of a unit, which changes with all that they depend on."""
    files = [
        (file.path, file.start, file.size, os.stat(file.path).st_mtime_ns) for file in unit.files
    ]
    kind = unit.format.name if unit.format else "text"
    parts = [unit.side, files, kind, unit.span, wanted.text_field, wanted.bos]
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape"))
    digest.update(tokenizer_digest(wanted.tokenizer).encode())
    return digest.hexdigest()[:24]


def tokenizer_digest(path: str) -> str:
    """SHA-256 of a tokenizer's file; "" for bytes."""
    return hashlib.sha256(file_of(path).read_bytes()).hexdigest() if path else ""


def _encode_all(
    folder: str,
    texts: Texts,
    keys: tuple[str, ...],
    wanted: Wanted,
    workers: int,
    progress: Progress,
) -> None:
    """Write the chunks of all units that are not there yet."""
    weights = _weights(texts)
    todo = [i for i, key in enumerate(keys) if not is_done(folder, key, wanted.on_error)]
    total = sum(weights)
    done = total - sum(weights[i] for i in todo)
    progress(done, total)
    for i in _in_processes(folder, texts, keys, todo, wanted, min(workers, len(todo))):
        done += weights[i]
        progress(done, total)


def _weights(texts: Texts) -> list[int]:
    """Bytes of input of each unit; the spans of a file share its bytes."""
    spans: dict[str, int] = {}
    for unit in texts.units:
        if unit.format:
            spans[unit.files[0].path] = spans.get(unit.files[0].path, 0) + 1
    return [
        unit.files[0].size // spans[unit.files[0].path]
        if unit.format
        else sum(file.size for file in unit.files)
        for unit in texts.units
    ]


def _in_processes(
    folder: str,
    texts: Texts,
    keys: tuple[str, ...],
    todo: list[int],
    wanted: Wanted,
    workers: int,
) -> Iterator[int]:
    """Do the units; yield the number of each when it is done."""
    if workers <= 1:
        _start_worker(wanted.tokenizer, wanted.bos, threads=True)
        for i in todo:
            _encode(folder, keys[i], texts.units[i], wanted.reading)
            yield i
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork would copy the threads' locks
        initializer=_start_worker,
        initargs=(wanted.tokenizer, wanted.bos),
    )
    try:
        jobs = {
            pool.submit(_encode, folder, keys[i], texts.units[i], wanted.reading): i for i in todo
        }
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            yield jobs[job]
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process of the preparation was killed, perhaps because memory ran out; run the "
            "same command again to go on, with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_TOKENIZER: Tokenizer | None = None
"""The tokenizer of this process."""


def _start_worker(tokenizer: str, bos: str, threads: bool = False) -> None:
    global _TOKENIZER
    if not threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    _TOKENIZER = load_tokenizer(tokenizer, bos)


def _encode(folder: str, key: str, unit: Unit, reading: Reading) -> None:
    assert _TOKENIZER is not None
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
    choice = choose(listed, texts.share, texts.count, wanted.duplicates == "drop")
    _, between = joints(tokenizer)
    paths = {n: os.path.join(folder, n) for n in (TRAIN, HELDOUT, SIZES)}
    train_tokens = write_array(paths[TRAIN], token_parts(chunks, choice.train_D, between.tokens))
    heldout_tokens = write_array(
        paths[HELDOUT], token_parts(chunks, choice.heldout_D, between.tokens)
    )
    sizes = size_parts(chunks, choice.heldout_D, between.sizes, size_table(tokenizer))
    write_array(paths[SIZES], sizes)
    for name, kept_D in ((TRAIN_STARTS, choice.train_D), (HELDOUT_STARTS, choice.heldout_D)):
        start_D = starts(listed.length_D[kept_D], len(between.tokens))
        write_array(os.path.join(folder, name), [start_D.astype(STARTS)])
    dtype = token_dtype(tokenizer.vocab_size)
    arrays = [map_tokens(paths[name], dtype) for name in (TRAIN, HELDOUT)]
    index = Index(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        opening=list(joints(tokenizer)[0].tokens),
        train_tokens=train_tokens,
        heldout_tokens=heldout_tokens,
        train_bytes=_bytes(listed, choice.train_D),
        heldout_bytes=_bytes(listed, choice.heldout_D),
        fingerprint=fingerprint(tokenizer.vocab_size, *arrays),
        source=texts.name,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer_digest(wanted.tokenizer),
        eval_fraction=wanted.eval_fraction,
        licence=licence,
        facts=dataclasses.asdict(facts_of(texts, tokenizer, choice, bare)),
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
