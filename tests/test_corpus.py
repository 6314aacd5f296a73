"""Reading text: every form gives the same documents, and broken input is named with its place and remedy."""

import bz2
import gzip
import json
import lzma

import pytest

from esolm.corpus import DataError, documents, pairs, shipped

DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: ä"]


def test_plain_text_is_one_document_or_one_between_form_feeds(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(DOCUMENTS[0], encoding="utf-8")
    two.write_text("\n\f\n".join(DOCUMENTS), encoding="utf-8")
    assert list(documents(one)) == DOCUMENTS[:1]
    assert list(documents(two)) == DOCUMENTS


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_compressed_files_are_read_as_they_are(tmp_path, suffix, pack):
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()))
    assert list(documents(path)) == DOCUMENTS


def test_zstandard_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "text.txt.zst"
    path.write_bytes(zstandard.compress(DOCUMENTS[0].encode()))
    assert list(documents(path)) == DOCUMENTS[:1]


def test_parquet_is_read_by_field(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "text.parquet"
    parquet.write_table(arrow.table({"body": DOCUMENTS, "id": [1, 2]}), path)
    assert list(documents(path, field="body")) == DOCUMENTS
    with pytest.raises(DataError, match=r"no field 'bdy'; did you mean 'body'"):
        list(documents(path, field="bdy"))


def test_a_folder_is_read_in_order_with_what_lies_below(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("c")
    (tmp_path / ".hidden").write_text("no")
    assert list(documents(tmp_path)) == ["c", "b"]


def test_pairs_come_from_named_fields(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"q": "2+2?", "a": "4"}\n\n{"q": "empty", "a": ""}\n')
    assert list(pairs(path, prompt="q", answer="a")) == [("2+2?", "4")]


def test_the_shipped_corpus_is_forty_two_documents():
    found = list(documents(shipped()))
    assert len(found) == 42 and sum(map(len, found)) > 5_000_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "every document is empty"),
        ("blank.txt", b" \n \f \n", "every document is empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8: byte 0xe9 at offset 3"),
        ("half.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
        ("list.jsonl", b"[1]\n", "no object with fields"),
        ("field.jsonl", b'{"txt": "a"}\n', r"line 1 of .* has no field 'text'; did you mean 'txt'"),
        ("number.jsonl", b'{"text": 3}\n', "is int, not text"),
        ("broken.txt.gz", b"no gzip", "cannot read"),
        ("cut.txt.xz", lzma.compress(b"text" * 1000)[:-20], "cannot read"),
        ("broken.parquet", b"no parquet", "cannot read"),
    ],
)
def test_broken_input_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(documents(tmp_path / name))


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "books.txt").write_text("x")
    with pytest.raises(DataError, match=r"there is no file .*book\.txt; did you mean 'books\.txt'"):
        list(documents(tmp_path / "book.txt"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no file in the folder"):
        list(documents(tmp_path / "none"))


def test_plain_text_is_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="prompts and answers come as JSON lines"):
        list(pairs(tmp_path / "a.txt"))
