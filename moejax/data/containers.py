"""The contents of a file, by its name and first bytes, so that only text is trained on.

The list has the common containers of text (JSON lines, Parquet, archives, arrays of token ids) and
files that often lie beside them. Those in ``READ`` have a reader in ``moejax.data.formats``, others
are refused. Every other file is read as text; ``census`` counts those that do not look like text.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence

from moejax.data.formats.compression import (
    COMPRESSIONS,
    Compression,
    Damaged,
    compression_of,
    open_bytes,
)
from moejax.errors import UserError

HEAD = 1 << 16
LONGEST_LINE = 1 << 24
"""Bytes of a file read in search of the end of its first line of JSON."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format, as a message names it, and the way to get text out of it.

    ``problem``: why it is not read, in words; empty: it is not text.
    """

    name: str
    remedy: str
    problem: str = ""


def _records(name: str, how: str) -> Kind:
    return Kind(name, f"write its records as JSON lines ({how})")


def _packed(name: str, command: str) -> Kind:
    return Kind(name, f"unpack it first ({command})")


def _converted(name: str, command: str) -> Kind:
    return Kind(name, f"convert it to text first ({command})")


def _no_text(name: str) -> Kind:
    return Kind(name, "name the text it was made from")


def _renamed(name: str, suffix: str) -> Kind:
    return Kind(name, f"rename it so that it ends in .{suffix}")


JSON_LINES = _renamed("JSON lines", "jsonl")
JSON_LIST = _renamed("a JSON list of records", "json")
PARQUET = _renamed("Parquet", "parquet")
ARROW = _renamed("Arrow", "arrow")
ARRAY_RECORD = _renamed("ArrayRecord", "array_record")
READ = (JSON_LINES, JSON_LIST, PARQUET, ARROW, ARRAY_RECORD)
"""Kinds that are read; their remedy is for files whose name says something else."""
FEATHER = _records("Feather, version 1", "pyarrow.feather.read_table(FILE).to_pylist()")
RECORDS = _records("a file of serialised records", "with the library that wrote it")
GZIP, ZSTD = _packed("gzip", "gunzip"), _packed("Zstandard", "zstd -d")
XZ, BZIP2, LZ4 = _packed("xz", "xz -d"), _packed("bzip2", "bunzip2"), _packed("LZ4", "lz4 -d")
COMPRESSED = _packed("a compressed file", "with the program that wrote it")
ZIP, TAR = _packed("a zip archive", "unzip"), _packed("a tar archive", "tar -xf")
SEVEN, RAR = _packed("a 7z archive", "7z x"), _packed("a RAR archive", "unrar x")
PDF = _converted("PDF", "pdftotext")
OFFICE = _converted("an office document or e-book", "pandoc -t plain")
NUMPY = Kind(
    "a NumPy array",
    "name the text it was made from; `moejax train` reads ids from files named .npy",
)
IDS = Kind(
    "token ids or another array of numbers",
    "name the text it was made from; `moejax train` reads arrays of ids as they are",
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
        (ARRAY_RECORD, "array_record arrayrecord"),
        (RECORDS, "tfrecord tfrecords mds avro orc msgpack recordio lance"),
        (LZ4, "lz4"),
        (COMPRESSED, "br sz snappy"),
        (ZIP, "zip jar whl"),
        (TAR, "tar tgz taz txz tlz tbz tbz2 tzst"),
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
    (0, b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", ARRAY_RECORD),
    (0, b"FEA1", FEATHER),
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


TEXT = tuple("txt text md rst csv tsv html htm xml json jsonl ndjson jsonlines py js".split())
"""Ends of names of text. Files of other names may have any format in ``READ``."""
LISTS = tuple(["", *"txt text json jsonl ndjson jsonlines".split()])
"""Ends of names of files that may hold JSON lists of records."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a file: its kind, None if it may be text, and the compression around it.

    ``refused``: the kind that a message names if the file is not read.
    """

    kind: Kind | None
    compression: Compression | None = None
    refused: Kind | None = None


def refuse_containers(paths: Sequence[str], field: str) -> None:
    """Refuse files that are not read.

    Raises:
      UserError: a file that is not read, of which the first is named, or that cannot be opened.
    """
    contents_of_all(paths, field)


def contents_of_all(paths: Sequence[str], field: str) -> list[Contents]:
    """The contents of files.

    Raises:
      UserError: a file that is not read, of which the first is named, or that cannot be opened.
    """
    contents: list[Contents] = []
    for path in paths:
        try:
            contents.append(contents_of(path))
        except OSError as error:
            raise UserError(f"{field}: cannot read {path!r}: {error.strerror}") from error
    refused = [(path, c.refused) for path, c in zip(paths, contents, strict=True) if c.refused]
    if refused:
        path, kind = refused[0]
        count = f" (nor are {len(refused) - 1} more of {len(paths)} files)"
        more = count if len(refused) > 1 else ""
        aside = "" if len(paths) == 1 else ", or move files that are not text out of the folder"
        problem = kind.problem or f"looks like {kind.name}, which is not text"
        raise UserError(f"{field}: {path!r} {problem}{more}; {kind.remedy}{aside}")
    return contents


def kind_of(path: str) -> Kind | None:
    """The format of a file that is not read; None if it is, or may be text."""
    return contents_of(path).refused


def contents_of(path: str) -> Contents:
    """The contents of a file, by name and first bytes. Raises OSError if it cannot be opened."""
    name = os.path.basename(path)
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(0)
        by_name, by_mark = compression_of(name), _compression_by_mark(head)
        if by_name is None and by_mark is None:
            kind, refused = _kind(name, file)
            return Contents(kind, None, refused)
    if by_name is None and by_mark is not None:
        if _suffix(name) in TEXT:
            return Contents(None, by_mark, _misnamed(name, by_mark.name, by_mark.suffixes[0]))
        return _compressed(path, name, by_mark)
    assert by_name is not None
    if by_mark != by_name:
        return Contents(None, by_name, _not_as_named(name, by_name.name))
    return _compressed(path, os.path.splitext(name)[0], by_name)


def _compressed(path: str, inner: str, compression: Compression) -> Contents:
    """The contents of a compressed file; ``inner``: the name of what is inside."""
    with open_bytes(path, compression) as stream:
        kind, refused = _kind(inner, stream)
    if kind and not refused and kind not in (JSON_LINES, JSON_LIST):
        problem = f"is {kind.name} inside of {compression.name}, which cannot be read in parts"
        refused = Kind(kind.name, f"unpack it; {kind.name} has a compression of its own", problem)
    return Contents(kind, compression, refused)


def _kind(name: str, file: io.BufferedReader) -> tuple[Kind | None, Kind | None]:
    """The kind of a file that is not compressed, and the kind to refuse it as, if it is."""
    suffix = _suffix(name)
    named = SUFFIXES.get(suffix)
    if named and named not in READ:
        return named, named
    try:
        is_utf16 = file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = kind_of_bytes(file, lists=suffix in LISTS)
    except Damaged:  # its reader says so
        return named, None
    if found and found not in READ:
        return found, found
    is_json = found in (JSON_LINES, JSON_LIST)
    if is_json and suffix in TEXT and suffix not in LISTS:
        return None, None
    if found == named or is_json and named in (None, JSON_LINES):
        return found, None
    if named == JSON_LINES and found is None:
        convert = Kind("UTF-16", "convert it (iconv -f UTF-16 -t UTF-8)", "is UTF-16, not UTF-8")
        return named, convert if is_utf16 else None
    if named and found is None:
        return named, _not_as_named(name, named.name)
    assert found is not None
    if named or suffix in TEXT:
        return found, _misnamed(name, found.name, found.remedy.rpartition(".")[2])
    return found, None


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower().lstrip(".")


def _not_as_named(name: str, kind: str) -> Kind:
    problem = f"is not {kind}, although its name ends in .{_suffix(name)}"
    return Kind(kind, "rename it after what it holds, or fetch it again", problem)


def _misnamed(name: str, kind: str, suffix: str) -> Kind:
    problem = f"is {kind}, although its name ends in .{_suffix(name)}"
    return Kind(kind, f"rename it so that it ends in .{suffix}", problem)


def _compression_by_mark(head: bytes) -> Compression | None:
    return next((c for c in COMPRESSIONS if re.match(c.mark, head, re.DOTALL)), None)


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
