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
        ("table.csv", "a,b", "Expected argument `source` to name .txt, .jsonl, .parquet files"),
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
