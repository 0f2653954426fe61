"""Three texts of one machine, cut from the built-in corpus, and a tokenizer for the first.

    python experiments/openmoe/texts.py runs/openmoe/texts

    code/           the standard library without the two below: what the model is trained on
    english/        the language reference, as its chapters of plain English
    tables/         the package `encodings`: long tables of character codes
    tokenizer.json  a byte-level BPE of 2048 tokens, trained on the training files of code/

English and tables are out of domain for a model of code/: it has seen their words in comments,
docstrings and literals, but not text that consists of them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from moejax.data.builtin import TOPICS, builtin_documents
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError

TABLES = "encodings/"
VOCABULARY = 2048
EVAL_FRACTION = 0.1
"""Held-out share of the files of code/: enough for a thousand sequences of 256 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Cuts the built-in corpus in three.")
    parser.add_argument("out", metavar="DIR", help="the new folder")
    write(Path(parser.parse_args().out))


def write(out: Path) -> None:
    """Makes the folder.

    Raises:
      UserError: it exists.
    """
    if out.exists():
        raise UserError(f"DIR={out} exists; remove it or choose another")
    for name, data in _files():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    train_bpe(
        str(out / "code"), VOCABULARY, str(out / "tokenizer.json"), eval_fraction=EVAL_FRACTION
    )


def _files() -> Iterator[tuple[str, bytes]]:
    for document in builtin_documents():
        data = document.read()
        if document.name == TOPICS:
            for topic, text in _topics(data):
                yield f"english/{topic.replace('/', '-')}.txt", text.encode()
        elif _is_utf8(data):
            folder = "tables" if document.name.startswith(TABLES) else "code"
            yield f"{folder}/{document.name}", data


def _topics(source: bytes) -> Iterator[tuple[str, str]]:
    """The chapters: the file is one assignment of a dictionary of strings."""
    names: dict[str, dict[str, str]] = {}
    exec(compile(source, TOPICS, "exec"), names)
    yield from names["topics"].items()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    main()
