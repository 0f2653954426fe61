"""Tables from files: values against pandas, and messages about refused files."""

import csv
import datetime
import gzip
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.contrib.multitask.baselines import table_baselines
from moejax.contrib.multitask.columns import parse_spec
from moejax.contrib.multitask.files import _hash, load_table
from moejax.contrib.multitask.source import TableSource
from moejax.errors import UserError

N = 200


def frame(seed=0, rows=N) -> Any:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "city": rng.choice(["Oslo", "Rome", "Kyiv", "Łódź"], rows),
        "code": rng.integers(10, 15, rows),
        "size": rng.normal(5, 2, rows),
        "member": rng.random(rows) < 0.5,
        "price": rng.normal(100, 20, rows),
        "bought": rng.integers(0, 2, rows),
        "when": rng.permutation(rows),
    })  # fmt: skip


FIELDS: dict[str, Any] = {
    "targets": ["price", "bought"],
    "categorical": ["city", "code"],
    "numeric": ["size"],
}


def write(data: Any, path) -> str:
    if path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def heldout_of(rows=N, fraction=0.1) -> np.ndarray:
    """The rows with the smallest hashes, as the documentation says."""
    return np.isin(np.arange(rows), np.argsort(_hash(rows))[: round(fraction * rows)])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_every_value_equals_that_read_by_pandas(tmp_path, suffix):
    data = frame()
    table = load_table(write(data, tmp_path / f"t{suffix}"), **FIELDS)
    held = heldout_of()
    assert (len(table.train), len(table.heldout)) == (180, 20)
    mean, spread = data["size"][~held].mean(), data["size"][~held].std(ddof=0)
    for rows, side in ((table.train, data[~held]), (table.heldout, data[held])):
        target_NM = table.in_units(rows.target_NM)
        np.testing.assert_allclose(target_NM, side[["price", "bought"]], rtol=1e-6)
        np.testing.assert_allclose(
            rows.dense_NF[:, 0], (side["size"] - mean) / spread, rtol=1e-5, atol=1e-6
        )
        for c, name in enumerate(("city", "code")):
            values = sorted(data[name][~held].unique())
            assert rows.category_NC[:, c].tolist() == [1 + values.index(v) for v in side[name]]
        assert rows.present_NM.all()
    assert table.category_sizes == (5, 6) and table.dense == ("size",)
    price, bought = table.targets
    np.testing.assert_allclose([price.mean, price.scale], [
        data["price"][~held].mean(), data["price"][~held].std(ddof=0)
    ])  # fmt: skip
    assert (price.kind, bought.kind, bought.mean, bought.scale) == ("regression", "binary", 0, 1)


def test_a_csv_and_a_parquet_of_the_same_rows_are_the_same_data(tmp_path):
    data = frame()
    tables = [load_table(write(data, tmp_path / f"t{s}"), **FIELDS) for s in (".csv", ".parquet")]
    assert tables[0].fingerprint == tables[1].fingerprint


def test_columns_are_chosen_by_type_when_none_is_named(tmp_path):
    table = load_table(
        write(frame(), tmp_path / "t.parquet"), targets=["price"], time="when", split="time"
    )
    assert table.category == ("city", "member") and table.dense == ("code", "size", "bought")


def test_a_split_by_time_holds_out_the_latest_rows(tmp_path):
    data = frame()
    for path in (tmp_path / "t.csv", tmp_path / "t.parquet"):
        stamps = data.assign(when=pd.Timestamp("2020-01-01") + pd.to_timedelta(data["when"], "h"))
        table = load_table(write(stamps, path), **FIELDS, split="time", time="when")
        np.testing.assert_allclose(
            table.in_units(table.heldout.target_NM)[:, 0],
            data["price"][data["when"] >= 180],
            rtol=1e-6,
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 500), st.floats(0.01, 0.99))
def test_the_hash_split_is_even_and_independent_of_other_rows(rows, fraction):
    held = np.flatnonzero(heldout_of(rows, fraction))
    more = np.flatnonzero(heldout_of(rows + 1, fraction))
    # One more row moves at most one other row across, beside itself.
    assert len(set(held) ^ set(more)) <= 2
    assert len(np.unique(_hash(rows))) == rows


def test_unknown_rare_and_missing_values_share_id_0(tmp_path):
    data, held = frame(), heldout_of()
    city = data["city"].astype(object)
    city[np.flatnonzero(held)[0]] = "Nowhere"
    city[np.flatnonzero(~held)[0]] = "Once"
    city[np.flatnonzero(~held)[1]] = None
    table = load_table(write(data.assign(city=city), tmp_path / "t.parquet"), **FIELDS)
    assert table.category_sizes[0] == 5
    assert table.heldout.category_NC[0, 0] == 0
    assert (table.train.category_NC[:2, 0] == 0).all() and (
        table.train.category_NC[2:, 0] > 0
    ).all()
    again = load_table(str(tmp_path / "t.parquet"), **FIELDS, min_count=1)
    assert again.category_sizes[0] == 6 and again.train.category_NC[0, 0] > 0


def test_spellings_of_missing_values_apply_to_categories_too(tmp_path):
    """As among numbers, in any case and with spaces around; and text that has it in it does not."""
    lines = ["city,size,y"] + ["NA,1,2", "nan,NA,3", " null ,n/a,4", "None,5,5", "Nancy,6,6"] * 4
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    table = load_table(str(path), targets=["y"], categorical=["city"], numeric=["size"])
    assert table.category_sizes == (2,)
    y_N = table.in_units(table.train.target_NM)[:, 0].round()
    np.testing.assert_array_equal(table.train.category_NC[:, 0] == 1, y_N == 6)
    np.testing.assert_array_equal(table.train.dense_NF[:, 0] == 0, np.isin(y_N, (3, 4)))


IDS = [1_500_000_000_000_000_000 + i for i in range(40)]
EXACT: dict[str, Any] = {
    "int64": IDS,
    "uint64": [2**64 - 1 - i for i in range(40)],
    "decimal": [Decimal(10**30 + i) for i in range(40)],
    "dictionary": pd.Categorical([str(i) for i in IDS]),
    "date": [datetime.date(2020, 1, 1) + datetime.timedelta(i) for i in range(40)],
    "nanoseconds": pd.to_datetime(IDS, unit="ns"),
    "float": [1.0 + i * 2.0**-52 for i in range(40)],
    "text with zeros at its end": [f"a{chr(0) * i}" for i in range(40)],
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
def test_categories_of_a_parquet_file_merge_only_equal_values(tmp_path, kind):
    """Float64 has 53 bits, and NumPy's text no zeros at its end."""
    values = EXACT[kind]
    data = pd.DataFrame({"who": pd.concat([pd.Series(values)] * 10), "y": range(400)})
    table = load_table(write(data, tmp_path / "t.parquet"), targets=["y"], categorical=["who"])
    assert table.category_sizes == (41,)
    held = heldout_of(400)
    ids = np.argsort(np.argsort(pd.Series(values).astype(object)))  # in the order of the values
    np.testing.assert_array_equal(table.train.category_NC[:, 0], 1 + np.tile(ids, 10)[~held])


def test_true_and_false_are_two_categories(tmp_path):
    data = pd.DataFrame({"who": [True, False] * 40, "y": range(80)})
    table = load_table(write(data, tmp_path / "t.parquet"), targets=["y"])
    assert table.category == ("who",) and table.category_values == (("False", "True"),)


@pytest.mark.parametrize("values", [
    IDS, [10**40 + i for i in range(40)], [f"{i:0{1 + i % 5}d}" for i in range(40)],
    ["0420", "420", "00420", "77", " 77", "+77", "77.0", "7.7e1"] * 5,
], ids=["64 bits", "more bits", "padded", "one number"])  # fmt: skip
def test_categories_of_a_csv_are_the_text_as_written(tmp_path, values):
    path = tmp_path / "t.csv"
    path.write_text("who,y\n" + "".join(f"{v},{i % 7}\n" for i, v in enumerate(values * 10)))
    table = load_table(str(path), targets=["y"], categorical=["who"])
    assert set(table.category_values[0]) == {str(v) for v in values}
    seen = [table.category_values[0][i - 1] for i in table.train.category_NC[:, 0]]
    written = np.array([str(v) for v in values * 10], dtype=object)
    np.testing.assert_array_equal(seen, written[~heldout_of(400)])


def test_numbers_as_categories_keep_their_order(tmp_path):
    """Ids of numeric text follow the order of the numbers, as in a Parquet file."""
    data = pd.DataFrame({"code": [2, 10, 1, 300] * 20, "y": range(80)})
    tables = [
        load_table(write(data, tmp_path / f"t{suffix}"), targets=["y"], categorical=["code"])
        for suffix in (".csv", ".parquet")
    ]
    assert tables[0].category_values == (("1", "2", "10", "300"),) == tables[1].category_values
    assert tables[0].fingerprint == tables[1].fingerprint


@pytest.mark.parametrize("values", [
    [10**18 + 10**4 * i for i in range(40)], [10**20 + 10**6 * i for i in range(40)],
    ["01", "1", "7", "8"] * 10,
], ids=["64 bits", "more bits", "padded"])  # fmt: skip
def test_numbers_that_look_like_identifiers_must_be_named(tmp_path, values, capsys):
    path = tmp_path / "t.csv"
    path.write_text("who,y\n" + "".join(f"{v},{i % 7}\n" for i, v in enumerate(values * 2)))
    with pytest.raises(
        UserError, match=r"task.categorical: 'who' has numbers that look like ident"
    ):
        load_table(str(path), targets=["y"])
    load_table(str(path), targets=["y"], numeric=["who"])
    said = capsys.readouterr().err
    assert ("'who' has whole numbers beyond 2**53, such as" in said) == (values[0] != "01")
    load_table(str(path), targets=["who"], numeric=["y"])
    assert ("task.targets: 'who' has whole" in capsys.readouterr().err) == (values[0] != "01")


@pytest.mark.parametrize("values", [
    [f"{10**18 + i}.0" for i in range(40)], ["041.9", "41.9"] * 20,
    ["007", "1.5"] * 20, ["0x1f", "0x20"] * 20, ["12E4", "120000"] * 20,
], ids=["floats", "padded fractions", "some padded", "hexadecimal", "exponents"])  # fmt: skip
def test_columns_whose_spellings_numbers_would_lose_must_be_named(tmp_path, values):
    path = tmp_path / "t.csv"
    path.write_text("who,y\n" + "".join(f"{v},{i % 7}\n" for i, v in enumerate(values * 2)))
    with pytest.raises(UserError, match=r"task.categorical: 'who' has numbers that look like iden"):
        load_table(str(path), targets=["y"])
    table = load_table(str(path), targets=["y"], categorical=["who"])
    assert set(table.category_values[0]) <= set(values) and table.category_sizes[0] > 2


def test_quantities_with_exponents_and_fractions_are_numbers(tmp_path):
    path = tmp_path / "t.csv"
    rows = ["0.5,1e+05,-0.25", "12.0,1.5E+18,0", "3,2e-7,0.0"] * 20
    path.write_text("a,b,c\n" + "\n".join(rows) + "\n")
    assert load_table(str(path), targets=["a"]).dense == ("b", "c")


def test_identifiers_stored_as_floats_give_a_warning(tmp_path, capsys):
    """pandas turns whole numbers with a missing one into floats, and 40 ids become two."""
    who: list[Any] = [2**60 + i for i in range(40)] * 4
    who[5] = None
    data = pd.DataFrame({"who": pd.Series(who, dtype="float64"), "y": range(160)})
    path = write(data, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=rf"'who' has numbers that look like .* {2**60}"):
        load_table(path, targets=["y"])
    table = load_table(path, targets=["y"], categorical=["who"])
    assert table.category_sizes == (2,)
    assert "have become one; write the column as integers or text" in capsys.readouterr().err
    small = data.assign(who=2.0**24 + np.arange(160) % 40)
    for kind, said in (("float64", False), ("float32", True)):
        path = write(small.astype({"who": kind}), tmp_path / "t.parquet")
        load_table(path, targets=["y"], categorical=["who"])
        assert ("have become one" in capsys.readouterr().err) == said


def test_text_with_an_underscore_is_not_a_number(tmp_path):
    """Python reads 1_0 as 10."""
    path = write(pd.DataFrame({"x": ["1_0", "7"] * 10, "y": range(20)}), tmp_path / "t.csv")
    with pytest.raises(UserError, match="'x' is '1_0' in row 1, which is not a number"):
        load_table(path, targets=["y"], numeric=["x"])


def test_bytes_of_every_arrow_type_are_categories(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()):
        who = pyarrow.array([b"a", b"b\0", b"b"] * 20, kind)
        parquet.write_table(pyarrow.table({"who": who, "y": range(60)}), tmp_path / "t.parquet")
        table = load_table(str(tmp_path / "t.parquet"), targets=["y"])
        assert table.category_values == (("61", "62", "6200"),)


def test_times_of_day_and_durations_are_seconds(tmp_path):
    import pyarrow
    from pyarrow import parquet

    second = np.arange(60) % 7
    for kind, unit in (
        (pyarrow.time32("s"), 1), (pyarrow.time32("ms"), 10**3), (pyarrow.time64("us"), 10**6),
        (pyarrow.time64("ns"), 10**9), (pyarrow.duration("ms"), 10**3),
        (pyarrow.duration("ns"), 10**9),
    ):  # fmt: skip
        ticks = pyarrow.array(second * unit, pyarrow.int32() if kind.bit_width == 32 else None)
        columns = {"at": ticks.cast(kind), "y": range(60)}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        table = load_table(str(tmp_path / "t.parquet"), targets=["at"], numeric=["y"])
        held = heldout_of(60)
        assert table.targets[0].mean == pytest.approx(second[~held].mean())
        named = load_table(str(tmp_path / "t.parquet"), targets=["y"], categorical=["at"])
        assert len(set(named.category_values[0])) == named.category_sizes[0] - 1 == 7


def test_a_compressed_csv_is_read_as_one_block(tmp_path):
    """Its size is that of the text, not of the file: a quoted value may be longer than that."""
    path = tmp_path / "t.tsv.gz"
    rows = [f'{i % 5}\t"{"x" * (i % 40)}\n{i % 3}"\t{100 + i % 9}\n' for i in range(100_000)]
    rows[-3] = '1\t"late"\t007\n'
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("y\ttext\tcode\n" + "".join(rows))
    table = load_table(str(path), targets=["y"], categorical=["text", "code"])
    assert len(table.train) + len(table.heldout) == 100_000
    with pytest.raises(UserError, match="'code' has numbers that look like identifiers.* 007"):
        load_table(str(path), targets=["y"])


@pytest.mark.parametrize(("content", "kind"), [
    (b'{"u": 1, "y": 2}\n' * 9, "JSON lines"), (b'[{"u": 1}]', "a JSON list of records"),
    (b"PK\x03\x04" + bytes(60), "a zip archive"), (gzip.compress(b"u,y\n1,2\n", mtime=0), "gzip"),
    (b"ARROW1" + bytes(60), "Arrow"),
])  # fmt: skip
def test_a_file_that_is_not_a_table_is_refused_with_its_format(tmp_path, content, kind):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"t.csv' looks like {kind}.*, which is not a table; name"):
        load_table(str(tmp_path / "t.csv"), targets=["y"])


def test_a_parquet_file_is_recognised_by_its_content(tmp_path):
    path = write(frame(), tmp_path / "t.parquet")
    for name in ("t.PARQUET", "part-0", "t.csv"):
        other = (tmp_path / "t.parquet").rename(tmp_path / name)
        assert len(load_table(str(other), **FIELDS).train) == 180
        other.rename(path)


def test_the_start_of_a_run_warns_about_constant_and_rare_features(tmp_path):
    data = frame().assign(same=7, who=range(N), near=1e17 + np.arange(N) % 3)
    fields = {**FIELDS, "categorical": ["city", "who"], "numeric": ["size", "same", "near"]}
    table = load_table(write(data, tmp_path / "t.csv"), **fields)
    said = TableSource(table, batch_size=4, seed=0, eval_rows=4).warnings()
    assert said[0].startswith("only 20 examples are held out, and a held-out loss of fewer than")
    assert [text.split(" has")[0].split(" is")[0] for text in said[1:]] == [
        "task.numeric: 'same'", "task.numeric: 'near'", "task.categorical: 'who'"
    ]  # fmt: skip
    good = load_table(write(frame(rows=2000), tmp_path / "t.csv"), **FIELDS)
    assert not TableSource(good, batch_size=4, seed=0, eval_rows=4).warnings()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["int", "time"])
def test_times_one_nanosecond_apart_are_sorted_exactly(tmp_path, kind, suffix):
    """In float64, 64 of them would be equal."""
    order = np.random.default_rng(0).permutation(N)
    when = 1_500_000_000_000_000_000 + order
    data = frame().assign(when=when if kind == "int" else pd.to_datetime(when, unit="ns"))
    path = write(data, tmp_path / f"t{suffix}")
    table = load_table(path, **FIELDS, split="time", time="when")
    latest = data["price"][order >= N - 20]
    np.testing.assert_allclose(table.in_units(table.heldout.target_NM)[:, 0], latest, rtol=1e-6)


def test_movielens_ids_match_as_written_in_both_files(movielens):
    folder, ratings = movielens
    large = ratings.assign(userId=ratings["userId"] + 2**60)
    large.to_csv(folder / "ratings.csv", index=False)
    table = load_table(str(folder))
    assert table.category_sizes[0] == 1 + ratings["userId"].nunique()
    movies = pd.read_csv(folder / "movies.csv").assign(movieId=["010", "020", "030"])
    movies.to_csv(folder / "movies.csv", index=False)
    with pytest.raises(
        UserError, match=r"movies.csv lists no movie of ratings.csv \('\d+' is none"
    ):
        load_table(str(folder))


def test_a_table_has_a_digest_of_its_ids_and_numbers(tmp_path):
    """Equal for the same training rows in another file, not for another value in the same place."""
    data = frame()
    first, again = (
        load_table(write(data, tmp_path / f"t{s}"), **FIELDS) for s in (".csv", ".parquet")
    )
    assert first.encoding == again.encoding
    for other in (data.assign(city=data["city"].replace("Oslo", "Nice")), data.assign(
        size=data["size"] * 2
    )):  # fmt: skip
        table = load_table(write(other, tmp_path / "other.csv"), **FIELDS)
        assert table.encoding != first.encoding
        np.testing.assert_array_equal(table.train.category_NC[:, 1], first.train.category_NC[:, 1])


def test_examples_in_a_report_are_named_by_the_values_of_the_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("who,y\n" + "".join(f"{v},{i}\n" for i, v in enumerate(["07", "7", "x"] * 30)))
    table = load_table(str(path), targets=["y"], categorical=["who"])
    source = TableSource(table, batch_size=4, seed=0, eval_rows=4)
    told = source.probe_arrays(source.eval_batches(4, 4)[0], 4)
    assert told["token_text"][:4] == ["who unknown", "who 07", "who 7", "who x"]


@pytest.mark.parametrize("rows", [300, 60_000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_values_may_have_line_breaks_in_files_of_any_size(tmp_path, rows, end):
    """RFC 4180. The large file has more than pyarrow's usual block of a megabyte."""
    path = tmp_path / "t.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(["y", "text", "who"])
        for row in range(rows):
            writer.writerow([row % 5, f'one{end}"two", {"x" * (row % 40)}', f"a{end}{row % 3}"])
    assert rows == 300 or path.stat().st_size > 2 * 2**20
    table = load_table(str(path), targets=["y"], categorical=["who", "text"])
    assert len(table.train) + len(table.heldout) == rows
    assert table.category_values[0] == (f"a{end}0", f"a{end}1", f"a{end}2")
    assert table.category_sizes[1] == 41


def test_types_of_columns_depend_on_the_whole_file(tmp_path):
    """Whole numbers that become fractions after two megabytes are numbers, and no categories."""
    rows, path = 300_000, tmp_path / "t.csv"
    lines = [f"{i % 7},{i % 5},{i % 3}" for i in range(rows)]
    lines[-3] = "1,2.5,low"
    path.write_text("y,x,w\n" + "\n".join(lines) + "\n")
    assert path.stat().st_size > 2**20
    table = load_table(str(path), targets=["y"])
    assert table.dense == ("x",) and table.category == ("w",)


def test_a_table_of_a_target_and_a_time_has_no_features(tmp_path):
    path = write(frame()[["price", "when"]], tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"no columns besides the targets and 'when' \(task.time\)"):
        load_table(path, targets=["price"], split="time", time="when")


def test_missing_numbers_become_the_mean_and_missing_targets_absent(tmp_path):
    data = frame()
    data.loc[3, "size"] = np.nan
    data.loc[[5, 6], "price"] = np.nan
    for suffix in (".csv", ".parquet"):
        table = load_table(write(data, tmp_path / f"t{suffix}"), **FIELDS)
        present = np.concatenate([table.train.present_NM, table.heldout.present_NM])
        assert (~present).sum(axis=0).tolist() == [2, 0]
        dense = np.concatenate([table.train.dense_NF, table.heldout.dense_NF])
        assert (dense == 0).sum() == 1 and np.isfinite(dense).all()
        mean = data["price"][~heldout_of()].mean()  # of those that are there, as in pandas
        np.testing.assert_allclose(table.targets[0].mean, mean)


def test_a_bound_makes_a_binary_target(tmp_path):
    data = frame()
    path = write(data, tmp_path / "t.csv")
    table = load_table(path, targets=["dear=price>=100", "price"], numeric=["size"])
    assert [(t.name, t.kind) for t in table.targets] == [
        ("dear", "binary"),
        ("price", "regression"),
    ]
    np.testing.assert_array_equal(table.train.target_NM[:, 0], data["price"][~heldout_of()] >= 100)


def test_a_target_has_three_notations():
    columns = ["rating", "a=b"]
    assert parse_spec("rating", columns) == ("rating", "rating", None)
    assert parse_spec("stars=rating", columns) == ("stars", "rating", None)
    assert parse_spec("liked=rating>=4", columns) == ("liked", "rating", 4.0)
    assert parse_spec("a=b", columns) == ("a=b", "a=b", None)
    for text in ("", "a>4", "rating>=x", "=rating"):
        with pytest.raises(UserError, match="task.targets"):
            parse_spec(text, columns)


@pytest.fixture
def movielens(tmp_path):
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame({
        "userId": rng.integers(1, 9, N), "movieId": rng.choice([10, 20, 30, 99], N),
        "rating": rng.choice([1.0, 2.5, 4.0, 5.0], N),
        "timestamp": rng.integers(10**9, 10**9 + 10**6, N),
    })  # fmt: skip
    movies = pd.DataFrame({
        "movieId": [10, 20, 30], "title": ["A, a film", "B", "C"],
        "genres": ["Drama|War", "(no genres listed)", "War"],
    })  # fmt: skip
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    movies.to_csv(tmp_path / "movies.csv", index=False)
    return tmp_path, ratings


def test_movielens_needs_no_fields(movielens):
    folder, ratings = movielens
    table, held = load_table(str(folder)), heldout_of()
    assert [(t.name, t.kind) for t in table.targets] == [
        ("rating", "regression"),
        ("liked", "binary"),
    ]
    assert table.category == ("userId", "movieId", "hour")
    assert table.dense == ("genre=Drama", "genre=War")
    train = ratings[~held]
    np.testing.assert_array_equal(table.train.target_NM[:, 1], train["rating"] >= 4)
    has = np.stack([train["movieId"] == 10, train["movieId"].isin([10, 30])], axis=1)
    for g in range(2):  # standardised: two values, the larger for movies of the genre
        assert len(np.unique(table.train.dense_NF[:, g])) == 2
        np.testing.assert_array_equal(table.train.dense_NF[:, g] > 0, has[:, g])
    by_time = load_table(str(folder), split="time")
    latest = ratings.sort_values("timestamp", kind="stable").index[-20:]
    rating_N = by_time.in_units(by_time.heldout.target_NM)[:, 0]
    np.testing.assert_allclose(rating_N, ratings["rating"][sorted(latest)], rtol=1e-6)


@pytest.mark.parametrize("values", [
    1.7e9 + np.random.default_rng(0).normal(0, 100, N), 1e9 + np.arange(N) % 7,
    -1e37 + 1e36 * np.arange(N), 1e-30 * np.arange(N), 1e-200 * np.arange(N), 1e15 + np.arange(N),
], ids=["times", "few", "huge", "small", "tiny", "large"])  # fmt: skip
def test_large_targets_keep_small_changes(tmp_path, values):
    """Float32 has steps of 128 at 1.7e9; the target's spread decides, not its size."""
    path = write(frame().assign(price=values), tmp_path / "t.parquet")
    table, held = load_table(path, targets=["price"], numeric=["size"]), heldout_of()
    exact = values.astype(np.longdouble)[~held]
    mean, scale = exact.mean(), exact.std()
    step = np.spacing(np.abs(values).max()) / scale  # of the mean in float64: 0.002 at 1e15
    for rows, side in ((table.train, values[~held]), (table.heldout, values[held])):
        assert rows.target_NM.dtype == np.float32
        assert len(np.unique(rows.target_NM)) == len(np.unique(side))
        np.testing.assert_allclose(rows.target_NM[:, 0], (side - mean) / scale, atol=1e-5 + step)
        error = table.in_units(rows.target_NM)[:, 0] - side
        assert np.abs(error).max() < (1e-6 + step) * scale
    baselines = table_baselines(
        table, len(table.heldout)
    )  # nothing to learn from: as the mean does
    assert abs(baselines["linear"] - baselines["mean"]) < 0.2 and baselines["mean"] < 2


def test_a_held_out_value_that_float32_cannot_square_is_refused(tmp_path):
    odd = np.flatnonzero(heldout_of())[0]
    price = frame()["price"] * 1e-3
    for name, value, known in (
        ("price", 1e30, r"task.targets: 'price' has a held-out value 5e\+31 times the spread"),
        ("size", 1e38, rf"task.numeric: 'size' is 1e\+38 in row {odd + 1}, 4.9e\+47 times"),
    ):
        data = frame().assign(price=price, size=frame()["size"] * 1e-10)
        data.loc[odd, name] = value
        with pytest.raises(UserError, match=known):
            load_table(write(data, tmp_path / "t.parquet"), targets=["price"], numeric=["size"])


def test_a_column_with_one_fraction_is_constant(tmp_path):
    """The spread of many 0.1 in float64 is not 0, and would blow up another value."""
    size = np.where(np.arange(N) == np.flatnonzero(heldout_of())[0], 0.2, 0.1)
    path = write(frame().assign(size=size), tmp_path / "t.parquet")
    table = load_table(path, targets=["price"], numeric=["size"])
    assert not table.train.dense_NF.any() and not table.heldout.dense_NF.any()


BAD: dict[str, Any] = {
    "column": ({"targets": ["prize"]}, r"task.targets: no column 'prize'; did you mean 'price'"),
    "feature": ({"numeric": ["sise"]}, r"task.numeric: no column 'sise'; did you mean 'size'"),
    "time": ({"split": "time", "time": "wen"}, r"task.time: no column 'wen'; did you mean 'when'"),
    "no time": ({"split": "time"}, r"task.time: task.split=time needs"),
    "split": ({"split": "random"}, r"task.split: 'random' is unknown; use one of hash, time"),
    "fraction": ({"eval_fraction": 0.0}, r"data.eval_fraction: 0.0 is not between"),
    "categories": ({"categorical": ["city", "city"]}, r"task.categorical: 'city' is named twice"),
    "numbers": ({"numeric": ["size", "size"]}, r"task.numeric: 'size' is named twice"),
    "both": ({"numeric": ["size", "code"]}, r"numeric: 'code' is in task.categorical too"),
    "leak": ({"numeric": ["price"]}, r"task.targets: 'price' is a feature too"),
    "twice": ({"targets": ["price", "price"]}, r"task.targets: two targets have one name"),
    "text": ({"targets": ["city"], "categorical": []}, r"'city' is '\w+' in row 1, which is no"),
    "no targets": ({"targets": []}, r"task.targets: name columns to predict; valid: bought"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_reported_in_one_line(tmp_path, case):
    fields, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        load_table(write(frame(), tmp_path / "t.csv"), **{**FIELDS, **fields})
    assert "\n" not in str(caught.value)


FILES = {
    "empty": (b"", r"data.path: '.*' is empty"),
    "header": (b"x,y\n", r"data.path: '.*' has 0 rows"),
    "constant": (b"x,y\n" + b"1,7\n2,7\n" * 9, r"task.targets: 'y' is 7 in every training row"),
    "absent": (b"x,y\n" + b"1,\n2,\n" * 9, r"task.targets: 'y' is missing in every training row"),
    "ragged": (b"x,y\n1,2\n3\n4,5\n", r"data.path: cannot parse '.*': .*columns"),
    "word": (
        b"x,y\n1,2\n3,4\n5,six\n",
        r"task.targets: 'y' is 'six' in row 3, which is not a number",
    ),
    "infinite": (b"x,y\n1,2\n3,inf\n5,6\n", r"task.targets: 'y' is inf in row 2; use finite"),
    "large": (b"x,y\n1,2\n3,1e300\n5,6\n", r"targets: 'y' is 1e\+300 in row 2, beyond .* float32"),
    "large feature": (
        b"x,y\n1,2\n-1e39,3\n5,6\n",
        r"task.numeric: 'x' is -1e\+39 in row 2, beyond",
    ),
    "bad feature": (b"x,y\n1,2\nfour,3\n5,6\n", r"task.numeric: 'x' is 'four' in row 2"),
    "twice": (b"x,y,x\n1,2,3\n3,4,5\n", r"two columns called 'x'"),
    "encoding": ("x,y\n1,2\nMünchen,3\n5,6\n".encode("latin-1"), r"'x' of '.*' is not UTF-8"),
    "header's encoding": (
        "x,y,ö\n1,2,3\n4,5,6\n".encode("latin-1"),
        r"header of '.*' is not UTF-8",
    ),
    "category's encoding": (b"x,y,c\n1,2,\xff\n4,5,b\n", r"cannot parse '.*': .*save .* as UTF-8"),
    "UTF-16": ("x,y\n1,2\n".encode("utf-16"), r"is UTF-16; save the file as UTF-8"),
    "binary": (
        b"\x93numpy\x00\xff\xfe,\n\xff\xff",
        r"data.path: cannot parse",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_reported_in_one_line(tmp_path, case):
    content, message = FILES[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        categorical = ["c"] if b",c" in content else []
        load_table(str(path), targets=["y"], numeric=["x"], categorical=categorical)
    assert "\n" not in str(caught.value)


def test_a_word_far_down_a_column_of_numbers_is_reported_with_its_row(tmp_path):
    """Types are guessed from the first megabyte."""
    path, rows = tmp_path / "t.csv", 200_000
    lines = [f"{i % 7},{i % 5}.25" for i in range(rows)]
    lines[-3] = "1,none at all"
    path.write_text("x,y\n" + "\n".join(lines) + "\n")
    assert path.stat().st_size > 2**20
    with pytest.raises(UserError, match=rf"'y' is 'none at all' in row {rows - 2}"):
        load_table(str(path), targets=["y"], numeric=["x"])


def test_other_paths_and_types_are_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data.path: '.*gone.csv' does not exist"):
        load_table(str(tmp_path / "gone.csv"), targets=["y"])
    with pytest.raises(UserError, match="is a folder without ratings.csv"):
        load_table(str(tmp_path), targets=["y"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="data.path: cannot parse"):
        load_table(str(tmp_path / "bad.parquet"), targets=["y"])
    nested = pd.DataFrame({"y": [1.0, 2.0, 3.0], "x": [[1], [2], [3]]})
    with pytest.raises(UserError, match="column 'x' has type list"):
        load_table(write(nested, tmp_path / "nested.parquet"), targets=["y"])
    pd.DataFrame({"user": [1], "rating": [2]}).to_csv(tmp_path / "ratings.csv", index=False)
    with pytest.raises(UserError, match=r"ratings.csv has no column 'userId'; did you mean 'user'"):
        load_table(str(tmp_path))
