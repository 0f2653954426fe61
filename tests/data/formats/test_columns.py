"""Parquet and Arrow: columns by name, nulls, and what is no text."""

import gzip
import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import ipc, parquet

from moejax.data.documents import Document, list_documents
from moejax.data.formats.files import data_files, without_descriptions
from moejax.data.formats.format import Record
from moejax.data.formats.table import format_of
from moejax.errors import UserError
from tests.written import arrow_bytes, parquet_bytes, places, read

WRITERS = {
    "a.parquet": lambda table, path: parquet.write_table(table, path, row_group_size=2),
    "file.arrow": lambda table, path: written(ipc.new_file, table, path),
    "stream.arrow": lambda table, path: written(ipc.new_stream, table, path),
}


def written(new, table: pyarrow.Table, path) -> None:
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    def run(**columns):
        path = tmp_path / request.param
        WRITERS[request.param](pyarrow.table(columns), path)
        return path

    return run


def test_a_null_is_named_by_its_row(write):
    path = write(text=["a", None, "", "d", None])
    for size in (1, 1 << 20):
        texts, bad = read(path, size)
        assert texts == ["a", "", "d"]
        assert bad == [
            f"{path.name}, row {row}: its field 'text' is null, not text" for row in (2, 5)
        ]
    assert places(path, 1)[-1] == f"{path.name}, row 5"


def test_a_column_of_nulls_has_no_texts(write):
    texts, bad = read(write(text=pyarrow.nulls(3)))
    assert texts == [] and len(bad) == 3


def test_bytes_that_are_not_utf8_are_named(write):
    path = write(text=pyarrow.array([b"caf\xe9", "caf\u00e9".encode(), b"\xed\xa0\x80"]))
    texts, bad = read(path)
    assert texts == ["caf\u00e9"]
    assert bad[0] == f"{path.name}, row 1: it is not UTF-8 (unexpected end of data at byte 4)"
    assert bad[1].startswith(f"{path.name}, row 3: it is not UTF-8")  # a lone surrogate


def test_a_missing_column_is_one_line_with_the_columns(write):
    path = write(body=["a"], title=["b"], meta=[{"text": "c"}])
    for field, ending in {
        "text": "its columns are 'body', 'title', 'meta'",
        "meta.text": "columns inside of columns are not read: move the text to one of its own",
    }.items():
        with pytest.raises(UserError) as error:
            read(path, text_field=field)
        assert str(error.value).startswith(
            f"data.text_field={field!r}: {str(path)!r} has no such column; "
        )
        assert str(error.value).endswith(ending)
    assert read(path, text_field="title") == (["b"], [])


@pytest.mark.parametrize(
    "column, kind",
    [
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([["a"], ["b"]]), "list<"),
        (pyarrow.array([{"en": "a"}, {"en": "b"}]), "struct<"),
    ],
)
def test_a_column_of_something_else_is_one_line(write, column, kind):
    path = write(text=column, body=["a", "b"])
    with pytest.raises(UserError, match=f"data.text_field='text'.* holds {kind}.*one of 'body'$"):
        read(path)


def test_a_column_twice_and_a_name_with_a_dot(tmp_path):
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    dotted = pyarrow.table({"a.text": ["a"], "a": [{"text": "b"}]})
    for name, write in WRITERS.items():
        write(twice, tmp_path / name)
        with pytest.raises(UserError, match="has 2 such columns; its columns are 'text', 'text'"):
            read(tmp_path / name)
        if name != "a.parquet":
            write(dotted, tmp_path / name)
            assert read(tmp_path / name, text_field="a.text") == (["a"], [])


def test_a_file_without_rows_has_no_documents(write):
    for size in (1, 1 << 20):
        assert read(write(text=pyarrow.array([], pyarrow.string())), size) == ([], [])


def test_extension_types_are_read_by_their_storage(write):
    column = pyarrow.array(['"a"', None]).cast(pyarrow.json_())
    texts, bad = read(write(text=column))
    assert texts == ['"a"'] and len(bad) == 1


def test_slices_of_a_larger_table_are_read(tmp_path):
    whole = pyarrow.table({"text": [str(i) for i in range(10)]}).slice(3, 4)
    for name, write in WRITERS.items():
        write(whole, tmp_path / name)
        assert read(tmp_path / name) == (["3", "4", "5", "6"], [])


def test_a_row_of_50_megabytes(write):
    text = "row " * 12_500_000
    assert read(write(text=["a", text, "b"]), 1 << 22) == (["a", text, "b"], [])


def test_only_the_column_with_the_text_is_read(tmp_path):
    """The pages of the other column are destroyed."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b"], "other": ["destroyed" * 50, "x"]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    meta = parquet.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    data[meta.data_page_offset : meta.data_page_offset + meta.total_compressed_size] = bytes(
        meta.total_compressed_size
    )
    path.write_bytes(data)
    assert read(path) == (["a", "b"], [])
    texts, bad = read(path, text_field="other")
    assert texts == [] and len(bad) == 1 and "row 1: row group 1 cannot be read" in bad[0]


def test_a_damaged_row_group_loses_its_rows_only(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(
        parquet_bytes(
            [f"text {i}" for i in range(9)], pyarrow.string(), row_group_size=3,
            write_page_checksum=True, use_dictionary=False, compression="none",
        )
    )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text 4", b"text X"))
    for size in (1, 1 << 20):
        texts, bad = read(path, size)
        assert texts == ["text 0", "text 1", "text 2", "text 6", "text 7", "text 8"]
        assert len(bad) == 1 and bad[0].startswith("a.parquet, row 4: row group 2 cannot be read")


def test_a_damaged_record_batch_loses_its_rows_only(tmp_path):
    """Its offsets run backwards, which would read beyond the text."""
    texts = [f"{i}" * 40 for i in range(9)]
    for name, new in {"file.arrow": ipc.new_file, "stream.arrow": ipc.new_stream}.items():
        data = arrow_bytes(texts, pyarrow.string(), new)
        offsets = b"".join(i.to_bytes(4, "little") for i in (0, 40, 80, 120))
        at = data.index(offsets, data.index(b"2" * 40))
        path = tmp_path / name
        path.write_bytes(data[: at + 4] + b"\xff\xff\xff\x7f" + data[at + 8 :])
        for size in (1, 1 << 20):
            found, bad = read(path, size)
            assert found == texts[:3] + texts[6:]
            assert len(bad) == 1 and bad[0].startswith(f"{name}, row 4: its record batch is dam")


def test_a_stream_without_its_end_is_reported(tmp_path):
    data = arrow_bytes(["a", "b"], pyarrow.string(), ipc.new_stream)
    path = tmp_path / "a.arrow"
    for damaged, reason in ((data[:-8], "the stream has no end"), (data + b"x", "behind its end")):
        path.write_bytes(damaged)
        for size in (1, 1 << 20):
            texts, bad = read(path, size)
            assert texts == ["a", "b"] and len(bad) == 1 and reason in bad[0]


@pytest.mark.slow
def test_folders_saved_by_datasets_give_their_documents_in_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"document {i}" for i in range(3000)]
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": texts}),
        test=datasets.Dataset.from_dict({"text": ["held", "out"]}),
    )
    saved.save_to_disk(tmp_path / "set", num_shards={"train": 3, "test": 1})
    loaded = datasets.load_from_disk(tmp_path / "set")["train"]
    loaded.map(lambda row: {"text": row["text"] + "!"})  # leaves a cache in the folder
    assert any(name.startswith("cache-") for name in os.listdir(tmp_path / "set" / "train"))
    read_back: dict[str, list[str]] = {"train": [], "test": []}
    for file, kind in data_files(list_documents(str(tmp_path / "set"))):
        assert kind is not None
        for span in kind.spans(file, 5000):
            for record in kind.read(file, span, "text"):
                assert isinstance(record, Record)
                read_back[file.name.partition("/")[0]].append(record.data.decode())
    assert read_back == {"train": texts, "test": ["held", "out"]}


def test_text_beside_records_is_left_out(tmp_path):
    (tmp_path / "README.md").write_text("About the data.")
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"notes"))
    assert [file.name for file, _ in data_files(list_documents(str(tmp_path)))] == [
        "README.md",
        "notes.txt.gz",
    ]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["a"], pyarrow.string()))
    assert [file.name for file, _ in data_files(list_documents(str(tmp_path)))] == ["a.parquet"]


def test_other_files_called_state_stay_documents(tmp_path):
    for name in ("state.json", "dataset_dict.json", "dataset_info.json", "a.txt"):
        (tmp_path / name).write_text('{"a": 1}')
    (tmp_path / "b.json").write_text("not JSON")
    files = list_documents(str(tmp_path))
    assert without_descriptions(files) == files


def test_a_file_name_that_is_not_utf8(tmp_path):
    data = arrow_bytes(["a"], pyarrow.string(), ipc.new_stream)
    for end, content in {"arrow": data, "parquet": parquet_bytes(["a"], pyarrow.string())}.items():
        path = os.fsencode(tmp_path) + b"/caf\xe9." + end.encode()
        with open(path, "wb") as file:
            file.write(content)
        name = os.fsdecode(path)
        found = format_of(name)
        assert found is not None
        file = Document("caf", name, len(content))
        records = list(found.read(file, found.spans(file, 1)[0], "text"))
        assert [record[1] for record in records] == [b"a"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory as Linux counts it")
def test_memory_of_a_parquet_file_is_that_of_a_batch(tmp_path):
    """One row group of 64 MB, not compressed: the process grows by far less than that."""
    path = tmp_path / "a.parquet"
    text = "some words " * 90
    table = pyarrow.table({"text": [f"{i} {text}" for i in range(64_000)]})
    parquet.write_table(
        table, path, row_group_size=100_000, use_dictionary=False, compression="none"
    )
    assert path.stat().st_size > 60 << 20
    del table
    code = f"""
from moejax.data.documents import Document
from moejax.data.formats.parquet import Parquet
lines = lambda: open("/proc/self/status")  # its peak begins anew with a program, unlike rusage
peak = lambda: next(int(line.split()[1]) for line in lines() if line.startswith("VmHWM"))
file = Document("a", {str(path)!r}, 1)
span, = Parquet().spans(file, 1 << 30)
records = Parquet().read(file, span, "text")
next(records)
before = peak()
assert sum(1 for _ in records) == 63_999
print(peak(), peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, growth = map(int, out.stdout.split())  # KiB
    assert growth < 24 << 10 and peak < 400 << 10
