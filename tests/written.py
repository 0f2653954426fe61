"""Files of documents, written by the libraries that people write them with."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import zstandard
from array_record.python import array_record_module  # pyright: ignore
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pyarrow import ipc, parquet

from moejax.data.documents import Document
from moejax.data.formats.format import Bad, Record
from moejax.data.formats.table import format_of

TEXTS = (
    "The first document.\nIt has two lines.\n",
    "",
    "Windows\r\nlines\r\n",
    "\ufeffa byte order mark",
    "NUL \0 inside",
    "family \U0001f469\u200d\U0001f469\u200d\U0001f467 and flag \U0001f1e9\U0001f1ea",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "separators\u2028\u2029\x85\x0b\x0c of lines",
    'quotes "like these", \\ and \\" and {brackets], [{"text": "no"}',
    "tab\tbell\a escape\x1b delete\x7f",
    " ",
    "long " * 3000,
    "\n",
    "the last",
)
"""Documents that readers often change: ends of lines, marks, escapes, an empty one."""


def read(path: Path, size: int = 1 << 20, text_field: str = "text") -> tuple[list[str], list[str]]:
    """The documents of a file, read in spans of a size, and the lines about bad records."""
    found = format_of(str(path))
    assert found is not None
    file = Document(path.name, str(path), path.stat().st_size)
    texts, bad = [], []
    for span in found.spans(file, size):
        for record in found.read(file, span, text_field):
            if isinstance(record, Record):
                texts.append(record.data.decode())
            else:
                assert isinstance(record, Bad)
                bad.append(f"{record.place}: {record.reason}")
    assert not any("\n" in line for line in bad)
    return texts, bad


def places(path: Path, size: int) -> list[str]:
    """The places of the documents of a file, read in spans of a size."""
    found = format_of(str(path))
    assert found is not None
    file = Document(path.name, str(path), path.stat().st_size)
    return [
        str(r.place) for span in found.spans(file, size) for r in found.read(file, span, "text")
    ]


def json_lines(texts: Sequence[str], ensure_ascii: bool = True, end: str = "\n") -> bytes:
    rows = ({"id": i, "text": text, "meta": {"n": [i]}} for i, text in enumerate(texts))
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + end for row in rows).encode()


def json_list(texts: Sequence[str], indent: int | None = None) -> bytes:
    rows = [{"id": i, "text": text, "meta": {"n": [i]}} for i, text in enumerate(texts)]
    return json.dumps(rows, indent=indent, ensure_ascii=indent is None).encode()


def zstandard_stream(data: bytes) -> bytes:
    """One frame that does not say how long its contents are, as ``zstd`` writes from a pipe."""
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    return packer.compress(data) + packer.flush()


def zstandard_frames(data: bytes) -> bytes:
    """Frames of 1000 bytes, with a skippable one between, as ``pzstd`` writes."""
    frames = (data[at : at + 1000] for at in range(0, len(data), 1000))
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return skippable.join(zstandard.ZstdCompressor().compress(frame) for frame in frames)


def parts(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Several compressed parts behind one another, as ``cat`` makes."""
    return lambda data: b"".join(compress(data[at : at + 1000]) for at in range(0, len(data), 1000))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zst": zstandard.ZstdCompressor().compress,
    "stream.zst": zstandard_stream,
    "parts.gz": parts(gzip.compress),
    "parts.bz2": parts(bz2.compress),
    "parts.xz": parts(lzma.compress),
    "parts.zst": zstandard_frames,
}


def table(texts: Sequence[str | None], kind: pyarrow.DataType) -> pyarrow.Table:
    column = pyarrow.array([t.encode() if t is not None else None for t in texts])
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(pyarrow.string()).dictionary_encode()
    elif pyarrow.types.is_string_view(kind) or pyarrow.types.is_binary_view(kind):
        column = pyarrow.array(texts, pyarrow.string_view()).cast(kind)
    else:
        column = column.cast(kind)
    return pyarrow.table(
        {"id": list(range(len(texts))), "text": column, "other": ["x"] * len(texts)}
    )


def parquet_bytes(texts: Sequence[str | None], kind: pyarrow.DataType, **options) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table(texts, kind), buffer, **options)
    return buffer.getvalue()


def arrow_bytes(
    texts: Sequence[str | None], kind: pyarrow.DataType, new, rows=3, **options
) -> bytes:
    buffer = io.BytesIO()
    written = table(texts, kind)
    with new(buffer, written.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(written, max_chunksize=rows)
    return buffer.getvalue()


def array_record_bytes(
    records: Sequence[bytes], path: Path, options: str = "group_size:1"
) -> bytes:
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def example_class() -> type:
    """``tf.train.Example``, built from its definition by the protobuf library."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str], parent=None):
        made = (parent.nested_type if parent else file.message_type).add(name=name)
        for field, number, label, kind, type_name in fields:
            made.field.add(
                name=field, number=number, label=label, type=kind, type_name=type_name or None
            )
        return made

    one, many, nested = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED, kinds.TYPE_MESSAGE
    message("BytesList", ("value", 1, many, kinds.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, kinds.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, kinds.TYPE_INT64, ""))
    feature = message(
        "Feature",
        ("bytes_list", 1, one, nested, ".t.BytesList"),
        ("float_list", 2, one, nested, ".t.FloatList"),
        ("int64_list", 3, one, nested, ".t.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", 1, many, nested, ".t.Features.FeatureEntry"))
    entry = message(
        "FeatureEntry",
        ("key", 1, one, kinds.TYPE_STRING, ""),
        ("value", 2, one, nested, ".t.Feature"),
        parent=features,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, one, nested, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def example(text: bytes, **values: bytes) -> bytes:
    made = example_class()()
    made.features.feature["text"].bytes_list.value.append(text)
    made.features.feature["id"].int64_list.value.extend([3, -1])
    made.features.feature["score"].float_list.value.append(0.5)
    for name, value in values.items():
        made.features.feature[name].bytes_list.value.append(value)
    return made.SerializeToString()


_KINDS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


def _packed(name: str, how: str) -> str:
    """``parts-a.jsonl.gz`` of "a.jsonl" and "parts.gz"."""
    variant, _, end = how.rpartition(".")
    return f"{variant}-{name}.{end}" if variant else f"{name}.{end}"


def write_all(folder: Path, texts: Sequence[str] = TEXTS) -> dict[str, Path]:
    """A file in every format and variant, with these documents in the field "text"."""
    lines, listed = json_lines(texts), json_list(texts, indent=2)
    files = {
        "a.jsonl": lines,
        "utf8.ndjson": json_lines(texts, ensure_ascii=False),
        "crlf.jsonl": json_lines(texts, end="\r\n"),
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "blank.jsonl": json_lines(texts, end="\n\n  \n"),
        "open-end.jsonl": lines[:-1],
        "lines.json": lines,
        "list.json": json_list(texts),
        "indented.json": listed,
        "bom.json": b"\xef\xbb\xbf" + listed,
        **{_packed("a.jsonl", how): pack(lines) for how, pack in COMPRESSORS.items()},
        **{_packed("list.json", how): pack(listed) for how, pack in COMPRESSORS.items()},
        "groups.parquet": parquet_bytes(texts, pyarrow.string(), row_group_size=3),
        "plain.parquet": parquet_bytes(
            texts, pyarrow.string(), compression="none", use_dictionary=False, data_page_size=50
        ),
    }
    for codec in ("snappy", "gzip", "zstd", "lz4", "brotli"):
        files[f"{codec}.parquet"] = parquet_bytes(texts, pyarrow.string(), compression=codec)
    for name, kind in _KINDS.items():
        files[f"{name}.parquet"] = parquet_bytes(texts, kind, row_group_size=5)
        files[f"{name}.file.arrow"] = arrow_bytes(texts, kind, ipc.new_file)
        files[f"{name}.stream.arrow"] = arrow_bytes(texts, kind, ipc.new_stream)
    for codec in ("lz4", "zstd"):
        for end, new in (("file", ipc.new_file), ("stream", ipc.new_stream)):
            files[f"{codec}.{end}.arrow"] = arrow_bytes(
                texts, pyarrow.string(), new, compression=codec
            )
    records = {
        "text": [text.encode() for text in texts],
        "json": json_lines(texts).splitlines(),
        "example": [example(text.encode(), other=b"no") for text in texts],
    }
    for name, rows in records.items():
        for options in ("group_size:1", "group_size:4", "group_size:1,uncompressed"):
            end = options.translate(str.maketrans(":,", "--"))
            path = folder / f"{name}.{end}.array_record"
            files[path.name] = array_record_bytes(rows, path, options)
    paths = {name: folder / name for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    return paths
