import gzip
import io
import json

import pytest

from wandazeta.data.sources import SourceOptions, read_documents, read_splits, split_of


def test_several_text_files_are_a_document_each(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two")
    documents = read_documents(str(tmp_path / "*.txt"))
    assert [(d.id, d.text) for d in documents] == [("a.txt", "a one\n\na two"), ("b.txt", "b one\n\nb two")]


def test_a_lone_text_file_is_cut_at_blank_lines(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\n\ntwo\nstill two\n\n\n\nthree\n")
    assert [d.text.strip() for d in read_documents(str(file))] == ["one", "two\nstill two", "three"]


def test_jsonl_and_parquet_hold_the_same(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": "x", "body": "line\u2028separator", "y": 1}, {"id": "z", "body": "two", "y": 0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = SourceOptions(text_column="body", label_column="y")
    from_jsonl, from_parquet = (
        read_documents(str(tmp_path / f"a.{suffix}"), reading, labelled=True) for suffix in ("jsonl", "parquet")
    )
    assert from_jsonl == from_parquet
    assert [(d.id, d.text, d.label) for d in from_jsonl] == [("x", "line\u2028separator", 1), ("z", "two", 0)]


def test_max_documents(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    assert len(read_documents(str(file), SourceOptions(max_documents=2))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "all of it is empty"),
        ("empty.jsonl", '{"text": " "}\n', "all of it is empty"),
        ("other.jsonl", '{"content": "a"}\n', "Expected a column 'text' in .*'content'"),
        ("broken.jsonl", '{"text": "a"}\n{"text"\n', "Expected JSON on line 2"),
        ("table.xlsx", "a,b", "Expected argument `source` to name .txt, .jsonl, .json, .csv, .*, .parquet files"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


@pytest.mark.parametrize("source", ["missing.txt", "nowhere/*.jsonl"])
def test_missing_files(tmp_path, source):
    with pytest.raises(ValueError, match="matches none"):
        read_documents(str(tmp_path / source))


def test_neither_file_nor_dataset():
    with pytest.raises(ValueError, match="neither local files nor a hub dataset"):
        read_documents("no-such/dataset-anywhere")


def test_unknown_sample():
    with pytest.raises(ValueError, match="one of wikipedia, brown"):
        read_documents("sample:nothing")


def test_splits_follow_the_fractions_and_the_id_alone():
    ids = [f"document {index}" for index in range(5000)]
    splits = [split_of(name, (0.7, 0.1, 0.2)) for name in ids]
    assert splits == [split_of(name, (0.7, 0.1, 0.2)) for name in ids]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert splits.count(split) / len(ids) == pytest.approx(share, abs=0.02)
    assert split_of("anything", (1.0, 0.0, 0.0)) == "train"


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.1, -0.1, 0.0), (0.5, 0.5)])
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="add up to 1"):
        SourceOptions(split_fractions=fractions)


def test_documents_are_split_by_their_own_fractions_or_the_given_ones(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{index}", "text": "a"}) + "\n" for index in range(50)))
    splits = read_splits(str(file), SourceOptions(), (0.5, 0.3, 0.2))
    for split, documents in splits.items():
        assert all(split_of(document.id, (0.5, 0.3, 0.2)) == split for document in documents)
    assert sum(map(len, splits.values())) == 50
    own = read_splits(str(file), SourceOptions(split_fractions=(1.0, 0.0, 0.0)), (0.5, 0.3, 0.2))
    assert [len(documents) for documents in own.values()] == [50, 0, 0]


def test_no_documents_are_no_maximum():
    with pytest.raises(ValueError, match="`max_documents` to be an integer larger than 0, but got 0"):
        SourceOptions(max_documents=0)


ROWS = [{"text": "one, with a comma", "label": 1}, {"text": "zwei\nZeilen", "label": 0}]
CSV = 'text,label\r\n"one, with a comma",1\r\n"zwei\nZeilen",0\r\n'
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", CSV), ("a.json", json.dumps(ROWS, indent=1)), ("b.json", JSONL), ("a.jsonl", JSONL)],
)
def test_every_format_holds_the_same(tmp_path, name, content, ending, bom):
    data = (bom + content).encode()
    (tmp_path / (name + ending)).write_bytes(gzip.compress(data) if ending else data)
    for source in (tmp_path / (name + ending), tmp_path):
        documents = read_documents(str(source), labelled=True)
        assert [(d.text, d.label) for d in documents] == [(row["text"], row["label"]) for row in ROWS]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_byte_order_mark_is_not_text(tmp_path, ending):
    data = "\ufeffone\r\n\r\ntwo".encode()
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(gzip.compress(data) if ending else data)
    assert [d.text for d in read_documents(str(file))] == ["one", "two"]


def parquet_of(values, column="text"):
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({column: values}), buffer)
    return buffer.getvalue()


def invalid_utf8():
    import pyarrow

    offsets, data = (pyarrow.py_buffer(data) for data in (b"\0\0\0\0\1\0\0\0\2\0\0\0", b"a\xff"))
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", lambda: b"PAR1 broken", r"'.*a.parquet' to be a complete Parquet file"),
        ("a.parquet", lambda: parquet_of(["some text"] * 99)[:-20], r"'.*a.parquet' to be a complete Parquet file"),
        ("a.parquet", lambda: parquet_of(invalid_utf8()), r"UTF-8 in column 'text' of row 2 of '.*a.parquet'"),
        ("a.parquet", lambda: parquet_of(["a"], "b"), r"column 'text' in row 1 of '.*a.parquet', but got 'b'"),
        (
            "a.jsonl",
            lambda: b'{"text": "a"}\n{"text": "\\ud800"}',
            r"column 'text' of line 2 of '.*a.jsonl', .*surrogate",
        ),
        ("a.json", lambda: b'[{"text": "a", "id": "\\udc00"}]', r"column 'id' of item 1 of '.*a.json', .*surrogate"),
        ("a.jsonl", lambda: b'{"text": "a"}\n\n{"text": "\xff"}', r"UTF-8 on line 3 of '.*a.jsonl'"),
        ("a.txt", lambda: b"a\nb \xff", r"UTF-8 on line 2 of '.*a.txt'"),
        ("a.csv", lambda: b"text\n\xff", r"UTF-8 on line 2 of '.*a.csv'"),
        ("a.csv", lambda: b"text,label\na,b,0\n", r"2 columns on line 2 of '.*a.csv', but got 3"),
        ("a.csv", lambda: b'text\n"a', r"CSV on line 2 of '.*a.csv'"),
        ("a.csv", lambda: b"text,text\na,b\n", r"different names of columns on line 1 of '.*a.csv'"),
        ("a.jsonl", lambda: b'["text"]\n', r"JSON object .* on line 1 of '.*a.jsonl', but got list"),
        ("a.json", lambda: b'[{"text": "a"},\n{"text"]', r"JSON on '.*a.json', line 2"),
        ("a.json", lambda: b'["a"]', r"JSON object .* on item 1 of '.*a.json', but got str"),
        ("a.txt.gz", lambda: b"not compressed", r"'.*a.txt.gz' to be a file that can be read"),
        ("a.jsonl.gz", lambda: gzip.compress(JSONL.encode())[:-9], r"'.*a.jsonl.gz' to be a file that can be read"),
        # no text: trained on as Python would print it
        (
            "a.jsonl",
            lambda: json.dumps({"text": CHAT}).encode(),
            r"column 'text' of line 1 of '.*a.jsonl', but got list",
        ),
        ("a.json", lambda: b'[{"text": "a"}, {"text": 0}]', r"column 'text' of item 2 of '.*a.json', but got int"),
        ("a.parquet", lambda: parquet_of([None, "a"]), None),
        ("a.parquet", lambda: parquet_of([{"role": "user"}]), r"column 'text' of row 1 of '.*a.parquet', but got dict"),
        ("a.parquet", lambda: parquet_of([b"raw"]), r"column 'text' of row 1 of '.*a.parquet', but got bytes"),
    ],
)
def test_errors_name_file_row_and_column(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content())
    if message is None:  # an empty cell is no error
        assert len(read_documents(str(tmp_path / name))) == 1
        return
    with pytest.raises(ValueError, match=message) as error:
        read_documents(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_number_in_a_csv_file_is_a_label(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    by_name = SourceOptions(label_names=["0", "1"])
    assert read_documents(str(tmp_path / "a.csv"), labelled=True)[0].label == 1
    assert read_documents(str(tmp_path / "a.csv"), by_name, labelled=True)[0].label == "1"
