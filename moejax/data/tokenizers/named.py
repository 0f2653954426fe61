"""The file that `data.tokenizer` names, and the special tokens that its folder names."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from moejax.errors import UserError

JSON, MODEL = "tokenizer.json", "tokenizer.model"
SUFFIX = ".model"
"""The end of the names of SentencePiece's files."""
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of a Hugging Face folder that name its special tokens; the first that does, counts."""
FILES = (
    *(JSON, MODEL, *CONFIGS),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
)
"""Files of a tokenizer in a Hugging Face folder."""


@dataclasses.dataclass(frozen=True)
class Special:
    """Special tokens that a folder names.

    Attributes:
      eos: the token that ends a text, as spelled; "" if none is named.
      bos: the token that begins one.
      adds_bos: whether `bos` is put before a text; None if the folder does not say. A
        tokenizer.json says so itself, and, as in transformers, is not overruled.
    """

    eos: str = ""
    bos: str = ""
    adds_bos: bool | None = None


UNSAID = Special()
"""The special tokens that a single file names outside itself: none."""


def file_of(path: str) -> Path:
    """The tokenizer's own file: the path itself, or that in the folder it names.

    Raises:
      UserError: a folder without a tokenizer that can be read.
    """
    named = Path(path).expanduser()
    if not named.is_dir():
        return named
    for name in (JSON, MODEL):
        if (named / name).is_file():
            return named / name
    raise UserError(
        f"data.tokenizer={path!r} holds neither {JSON} nor {MODEL}; save the fast tokenizer there "
        f"(save_pretrained of transformers' AutoTokenizer), or name a tokenizer's file"
    )


def tokenizer_digest(path: str) -> str:
    """SHA-256 of the tokenizer's own file; "" for bytes."""
    return hashlib.sha256(file_of(path).read_bytes()).hexdigest() if path else ""


def folder_of(path: str) -> Path:
    """The folder of a tokenizer's other files: the one it names, or the one the file lies in."""
    named = Path(path).expanduser()
    return named if named.is_dir() else named.parent


def special_of(path: str) -> Special:
    """The special tokens that a folder's files name; none where the path is that of a single file.

    Raises:
      UserError: a file that is no JSON object.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return UNSAID
    files = [_read(folder / name) for name in CONFIGS if (folder / name).is_file()]
    named: dict[str, Any] = {}
    for keys in reversed(files):
        named |= {key: value for key, value in keys.items() if value is not None}
    adds = named.get("add_bos_token")
    return Special(
        _spelled(named.get("eos_token")),
        _spelled(named.get("bos_token")),
        adds if isinstance(adds, bool) else None,
    )


def _spelled(token: Any) -> str:
    """The text of a token, which may be an object with its properties."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"data.tokenizer: {str(path)!r} cannot be read ({error}); restore or remove it"
        ) from error
    if not isinstance(keys, dict):
        raise UserError(f"data.tokenizer: {str(path)!r} is no JSON object; restore or remove it")
    return keys
