"""Files that are not text, recognised by names and first bytes, so that none is trained on as text.

The list has the common containers of text (JSON lines, Parquet, archives, arrays of token ids) and
files that often lie beside them. Every other file is read as text; ``census`` counts those that do
not look like text.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence

from moejax.errors import UserError

HEAD = 1 << 16
LONGEST_LINE = 1 << 24
"""Bytes of a file read in search of the end of its first line of JSON."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format, as a message names it, and the way to get text out of it."""

    name: str
    remedy: str


def _records(name: str, how: str) -> Kind:
    return Kind(name, f"write the text of each record to a .txt file of its own ({how})")


def _packed(name: str, command: str) -> Kind:
    return Kind(name, f"unpack it first ({command})")


def _converted(name: str, command: str) -> Kind:
    return Kind(name, f"convert it to text first ({command})")


def _no_text(name: str) -> Kind:
    return Kind(name, "name the text it was made from")


JSON_LINES = _records("JSON lines", "json.loads(line)['text'] in Python")
JSON_LIST = _records("a JSON list of records", "json.load(file)[i]['text'] in Python")
PARQUET = _records("Parquet", "pyarrow.parquet.read_table(FILE)['text'].to_pylist()")
ARROW = _records(
    "Arrow, as in a Hugging Face dataset", "datasets.load_from_disk(FOLDER)['train']['text']"
)
RECORDS = _records("a file of serialised records", "with the library that wrote it")
GZIP, ZSTD = _packed("gzip", "gunzip"), _packed("Zstandard", "zstd -d")
XZ, BZIP2, LZ4 = _packed("xz", "xz -d"), _packed("bzip2", "bunzip2"), _packed("LZ4", "lz4 -d")
COMPRESSED = _packed("a compressed file", "with the program that wrote it")
ZIP, TAR = _packed("a zip archive", "unzip"), _packed("a tar archive", "tar -xf")
SEVEN, RAR = _packed("a 7z archive", "7z x"), _packed("a RAR archive", "unrar x")
PDF = _converted("PDF", "pdftotext")
OFFICE = _converted("an office document or e-book", "pandoc -t plain")
NUMPY = _no_text("a NumPy array")
IDS = Kind(
    "token ids or another array of numbers",
    "name the text it was made from, or the folder that `moejax data prepare` wrote",
)
WEIGHTS = _no_text("weights of a model")
PICKLE = _no_text("a Python pickle")
DATABASE = _records("a database", "with a query")
MEDIA = Kind("a picture, sound or film", "keep text files only")
PROGRAM = Kind("a compiled program", "keep text files only")

# Without .pt, .so and .ps, which are languages too; their first bytes identify them.
SUFFIXES: dict[str, Kind] = {
    suffix: kind
    for kind, suffixes in (
        (JSON_LINES, "jsonl ndjson jsonlines"),
        (PARQUET, "parquet pq"),
        (ARROW, "arrow feather"),
        (RECORDS, "tfrecord tfrecords mds avro orc msgpack recordio array_record lance"),
        (GZIP, "gz tgz gzip"),
        (ZSTD, "zst zstd"),
        (XZ, "xz lzma txz"),
        (BZIP2, "bz2 tbz2"),
        (LZ4, "lz4"),
        (COMPRESSED, "br sz snappy"),
        (ZIP, "zip jar whl"),
        (TAR, "tar"),
        (SEVEN, "7z"),
        (RAR, "rar"),
        (PDF, "pdf djvu"),
        (OFFICE, "doc docx odt rtf epub mobi xls xlsx ppt pptx"),
        (NUMPY, "npy npz"),
        (IDS, "bin idx"),
        (WEIGHTS, "safetensors gguf pth ckpt onnx h5 hdf5"),
        (PICKLE, "pkl pickle joblib"),
        (DATABASE, "db sqlite sqlite3 mdb lmdb duckdb"),
        (MEDIA, "png jpg jpeg gif bmp webp tif tiff ico mp3 wav flac ogg mp4 mkv avi mov webm"),
        (PROGRAM, "exe dll dylib pyc wasm"),
    )
    for suffix in suffixes.split()
}

MAGIC: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"PAR1", PARQUET),
    (0, b"ARROW1", ARROW),
    (0, b"\xff\xff\xff\xff", ARROW),
    (0, b"ORC", RECORDS),
    (0, b"Obj\x01", RECORDS),
    (0, b"\x1f\x8b", GZIP),
    (0, b"\x28\xb5\x2f\xfd", ZSTD),
    (0, b"\xfd7zXZ\x00", XZ),
    (4, b"1AY&SY", BZIP2),  # after the level: the mark of the first block
    (0, b"\x04\x22\x4d\x18", LZ4),
    (0, b"PK\x03\x04", ZIP),
    (0, b"PK\x05\x06", ZIP),
    (257, b"ustar", TAR),
    (0, b"7z\xbc\xaf\x27\x1c", SEVEN),
    (0, b"Rar!\x1a\x07", RAR),
    (0, b"%PDF-", PDF),
    (0, b"%!PS", PDF),
    (0, b"{\\rtf", OFFICE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"GGUF", WEIGHTS),
    (0, b"\x89HDF\r\n\x1a\n", WEIGHTS),
    (8, b'{"', WEIGHTS),  # safetensors: the length of a JSON header, then the header
    (0, b"\x80\x02", PICKLE),
    (0, b"\x80\x03", PICKLE),
    (0, b"\x80\x04\x95", PICKLE),
    (0, b"\x80\x05\x95", PICKLE),
    (0, b"SQLite format 3\x00", DATABASE),
    (0, b"\x89PNG\r\n\x1a\n", MEDIA),
    (0, b"\xff\xd8\xff", MEDIA),
    (0, b"GIF87a", MEDIA),
    (0, b"GIF89a", MEDIA),
    (0, b"RIFF", MEDIA),
    (0, b"OggS", MEDIA),
    (0, b"fLaC", MEDIA),
    (4, b"ftyp", MEDIA),
    (0, b"\x7fELF", PROGRAM),
    (0, b"\x00asm", PROGRAM),
    (0, b"\xca\xfe\xba\xbe", PROGRAM),
)
NEEDS_ZERO = (b'{"', b"ftyp", b"RIFF", b"ORC")
"""Marks that text may begin with. They count only near a byte 0, which text does not contain."""


def refuse_containers(paths: Sequence[str], field: str) -> None:
    """Refuse files that are not text.

    Raises:
      UserError: a file that is not text, of which the first is named, or that cannot be read.
    """
    refused: list[tuple[str, Kind]] = []
    for path in paths:
        try:
            kind = kind_of(path)
        except OSError as error:
            raise UserError(f"{field}: cannot read {path!r}: {error.strerror}") from error
        if kind:
            refused.append((path, kind))
    if not refused:
        return
    path, kind = refused[0]
    more = f" (nor are {len(refused) - 1} more of {len(paths)} files)" if len(refused) > 1 else ""
    aside = "" if len(paths) == 1 else ", or move files that are not text out of the folder"
    raise UserError(
        f"{field}: {path!r} looks like {kind.name}, which is not text{more}; {kind.remedy}{aside}"
    )


def kind_of(path: str) -> Kind | None:
    """The format of a file by its name and first bytes; None if it may be text."""
    suffix = os.path.splitext(path)[1].lower().lstrip(".")
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    with open(path, "rb") as file:
        return kind_of_bytes(file, lists=suffix in ("", "json", "txt", "text"))


def kind_of_bytes(file: io.BufferedIOBase, lists: bool = True) -> Kind | None:
    """The format of a file by its first bytes, from its current position; None if it may be text.

    ``lists``: whether to recognise JSON lists of records, which look like the start of a program.
    """
    head = file.read(HEAD)
    for at, mark, kind in MAGIC:
        if head[at : at + len(mark)] == mark and (
            mark not in NEEDS_ZERO or b"\0" in head[: at + len(mark) + 8]
        ):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"{") and _is_json_lines(text, file):
        return JSON_LINES
    if lists and re.match(rb"\[\s*\{\s*\"", text):
        return JSON_LIST
    return None


def _is_json_lines(head: bytes, file: io.BufferedIOBase) -> bool:
    """True if the first line is a JSON object and the next one begins another."""
    if b"\n" not in head:
        head += file.read(LONGEST_LINE)
    first, _, rest = head.partition(b"\n")
    if not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
