"""Reading text: every form gives the same documents, and broken input is named with its place and remedy."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm import corpus
from esolm.corpus import DataError, Meter, documents, fingerprint, pairs, shipped

DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: ä"]
PACKERS = [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]


def lines_of(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# -- plain text --------------------------------------------------------------------------------------------


def test_plain_text_is_one_document_or_one_between_form_feeds(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(DOCUMENTS[0], encoding="utf-8")
    two.write_text("\n\f\n".join(DOCUMENTS), encoding="utf-8")
    assert list(documents(one)) == DOCUMENTS[:1]
    assert list(documents(two)) == DOCUMENTS


def test_a_separator_of_the_users_own_takes_the_line_breaks_around_it(tmp_path):
    path = tmp_path / "books.txt"
    path.write_text("one\n\n<|next|>\n two\f<|next|>")
    assert list(documents(path, separator="<|next|>")) == ["one", " two\f"]
    with pytest.raises(ValueError, match="separator must not be empty"):
        list(documents(path, separator=""))


@given(st.text("ab\n", max_size=40), st.sampled_from(["b", "ab", "aa", "bab"]), st.sets(st.integers(1, 39)))
@settings(max_examples=300, deadline=None)
def test_a_separator_is_found_wherever_the_file_is_cut_into_chunks(text, separator, cuts):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = [text[start:stop] for start, stop in pairwise(places)]
    whole = text.split(separator)
    expected = [part.strip("\r\n") for part in whole] if len(whole) > 1 else whole
    assert list(corpus._separated(chunks, separator)) == expected


def test_a_text_of_many_chunks_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 5)
    path = tmp_path / "text.txt"
    path.write_text("\n<next>\n".join(DOCUMENTS * 3), encoding="utf-8")  # "ä" and separators lie across chunks
    assert list(documents(path, separator="<next>")) == DOCUMENTS * 3


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    (tmp_path / "rows.jsonl").write_bytes(codecs.BOM_UTF8 + lines_of({"text": "row"}))
    (tmp_path / "rows.json").write_bytes(codecs.BOM_UTF8 + b'[{"text": "entry"}]')
    assert list(documents(tmp_path)) == ["entry", "row", "text"]


def test_line_breaks_stay_as_the_file_has_them(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"one\r\ntwo\r\n\f\r\nthree\r")
    assert list(documents(path)) == ["one\r\ntwo", "three"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "with a mark"])
@pytest.mark.parametrize("place", [3, 4095, 4096, 4097, 10_000])
def test_a_byte_that_is_not_utf_8_is_named_with_its_place_in_whichever_chunk(tmp_path, monkeypatch, mark, place):
    monkeypatch.setattr(corpus, "_CHUNK", 4096)
    content = mark + "é".encode() * 6000
    path = tmp_path / "latin.txt"
    path.write_bytes(content[:place] + b"\xff" + content[place:])
    where = place if (place - len(mark)) % 2 == 0 else place - 1  # an é cut in two is broken from its first byte
    with pytest.raises(DataError, match=rf"latin\.txt is not UTF-8: byte 0x\w\w at offset {where}; convert it"):
        list(documents(path))


def test_a_character_cut_off_at_the_end_is_named(tmp_path):
    (tmp_path / "cut.txt").write_bytes(b"ab\xc3")
    with pytest.raises(DataError, match="byte 0xc3 at offset 2"):
        list(documents(tmp_path / "cut.txt"))


# -- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL"])
def test_json_lines_are_read_by_field_under_every_name(tmp_path, name):
    (tmp_path / name).write_bytes(lines_of({"body": DOCUMENTS[0]}) + b"\n" + lines_of({"body": DOCUMENTS[1], "id": 3}))
    assert list(documents(tmp_path / name, field="body")) == DOCUMENTS


def test_an_array_of_json_is_read_entry_by_entry(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=2))
    assert list(documents(path)) == DOCUMENTS
    path.write_text('[{"text": "a"}, {"txt": "b"}]')
    with pytest.raises(DataError, match=r"entry 2 of .*texts\.json has no field 'text'"):
        list(documents(path))


def test_a_null_text_is_an_empty_one_and_left_out(tmp_path):
    path = tmp_path / "null.jsonl"
    path.write_bytes(lines_of({"text": None}, {"text": "there"}))
    assert list(documents(path)) == ["there"]


def test_escaped_characters_are_joined_and_half_of_one_is_named(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n{"text": "x\\ud83d"}\n')
    texts = documents(path)
    assert next(texts) == "\U0001f600"
    with pytest.raises(DataError, match=r"field 'text' of line 2 of .* has half a surrogate pair, U\+D83D"):
        next(texts)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "with a mark"])
def test_a_line_of_json_that_is_not_utf_8_is_named_with_the_place_in_it(tmp_path, mark):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(mark + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=f"line 1 of .* is not UTF-8: byte 0xe9 at offset {13 + len(mark)}"):
        list(documents(path))


# -- compressed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_compressed_files_are_read_as_they_are(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines_of({"text": DOCUMENTS[0]})))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(DOCUMENTS[1].encode()))
    assert list(documents(tmp_path)) == DOCUMENTS


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path, suffix, pack, kind):
    content = os.urandom(9000).hex().encode() if kind == ".txt" else lines_of(*[{"text": os.urandom(99).hex()}] * 50)
    path = tmp_path / f"cut{kind}{suffix}"
    path.write_bytes(pack(content)[:-20])
    with pytest.raises(DataError, match=rf"cannot read .*cut\{kind}\{suffix}: "):
        list(documents(path))


def test_frames_of_zstandard_are_read_one_after_the_other(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="ZSTANDARD IS NOT INSTALLED: pip install 'esolm[data]'")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    stream = zstandard.ZstdCompressor().compressobj()  # of a size that the frame does not tell
    large = "a long text " * 200_000
    frames = [zstandard.compress(large.encode()), skipped, stream.compress(b" and more") + stream.flush()]
    path = tmp_path / "text.txt.zst"
    path.write_bytes(b"".join(frames))
    assert list(documents(path)) == [large + " and more"]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_file_of_zstandard_that_is_cut_off_is_named(tmp_path, cut):
    """The library's own reader takes what is there for the whole text."""
    zstandard = pytest.importorskip("zstandard", reason="ZSTANDARD IS NOT INSTALLED: pip install 'esolm[data]'")
    path = tmp_path / "text.txt.zst"
    path.write_bytes(zstandard.compress(b"first") + zstandard.compress(os.urandom(9000).hex().encode())[:-cut])
    with pytest.raises(DataError, match=r"cannot read .*text\.txt\.zst: the file is cut off"):
        list(documents(path))


def test_what_is_no_zstandard_is_named(tmp_path):
    pytest.importorskip("zstandard", reason="ZSTANDARD IS NOT INSTALLED: pip install 'esolm[data]'")
    (tmp_path / "text.zst").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"cannot read .*text\.zst"):
        list(documents(tmp_path / "text.zst"))


# -- Parquet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_is_read_by_field_compressed_or_not(tmp_path, suffix):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "text.parquet"
    parquet.write_table(arrow.table({"body": [DOCUMENTS[0], None, DOCUMENTS[1]], "id": [1, 2, 3]}), path)
    if suffix:
        packed = tmp_path / "text.parquet.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert list(documents(path, field="body")) == DOCUMENTS
    with pytest.raises(DataError, match=r"text\.parquet.* has no field 'bdy'; did you mean 'body'"):
        list(documents(path, field="bdy"))
    with pytest.raises(DataError, match=r"field 'id' of row 1 of .* is int, not text"):
        list(documents(path, field="id"))


def test_parquet_that_is_cut_off_is_named(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "text.parquet"
    parquet.write_table(arrow.table({"text": DOCUMENTS}), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot read .*text\.parquet"):
        list(documents(path))


# -- folders and names -------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_with_what_lies_below_but_for_what_is_hidden(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden", ".git/config", "a/.cache/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(tmp_path)) == ["a/c.txt", "b.txt"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".texts").mkdir()
    (tmp_path / ".texts" / "a.txt").write_text("a")
    assert list(documents(tmp_path / ".texts")) == ["a"]


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "books.txt").write_text("x")
    with pytest.raises(DataError, match=r"there is no file .*book\.txt; did you mean 'books\.txt'"):
        list(documents(tmp_path / "book.txt"))
    with pytest.raises(DataError, match=r"there is no file .*none.x\.txt$"):
        list(documents(tmp_path / "none" / "x.txt"))


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / ".hidden").write_text("no")
    with pytest.raises(DataError, match="no file in the folder"):
        list(documents(tmp_path))


def test_a_link_that_leads_nowhere_is_named_rather_than_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*b\.txt: No such file"):
        list(documents(tmp_path))


@pytest.mark.parametrize("name", ["books.tar", "books.tar.gz", "books.tgz", "books.zip"])
def test_an_archive_is_refused_and_not_read_as_a_text(tmp_path, name):
    """A tar is UTF-8 if its texts are, so that its headers were learned from; a zip was to be converted with iconv."""
    (tmp_path / "a.txt").write_text("some text")
    form = {".zip": "zip", ".tar": "tar"}.get(Path(name).suffix, "gztar")
    made = Path(shutil.make_archive(str(tmp_path / "books"), form, tmp_path, "a.txt"))
    made.rename(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is an archive of files: unpack it"):
        list(documents(tmp_path))


def test_a_pipe_is_refused_since_it_cannot_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (documents, lambda path: iter(fingerprint(path)), lambda path: iter([Meter(path)])):
        with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
            next(read(tmp_path / "pipe"))


@pytest.mark.parametrize("what", ["file.txt", "folder"])
def test_what_may_not_be_read_is_named(tmp_path, what):
    """Root may read everything, so that a user without rights tries."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "seen.txt").write_text("seen")
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / what).chmod(0)
    code = (
        "import os, sys; from esolm import corpus; os.getuid() or os.setuid(65534)\n"
        "list(getattr(corpus, sys.argv[1])(sys.argv[2]))"
    )
    tmp_path.chmod(0o755)
    try:
        for function in ("documents", "fingerprint"):
            command = [sys.executable, "-c", code, function, "."]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert re.search(rf"DataError: cannot read (\./)?{what}: Permission denied", done.stderr)
    finally:
        (tmp_path / what).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "every document is empty"),
        ("blank.txt", b" \n \f \n", "every document is empty"),
        ("empty.jsonl", b"\n\n", "every document is empty"),
        ("utf16.txt", "text".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
        ("half.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
        ("pretty.json", b'{\n  "text": "a"\n}', "line 1 of .* is not JSON.*a line holds one whole object"),
        ("deep.jsonl", b"[" * 100_000, "line 1 of .* is not JSON"),
        ("digits.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "line 1 of .* is not JSON"),
        ("list.jsonl", b"[1]\n", "no object with fields"),
        ("field.jsonl", b'{"txt": "a"}\n', r"line 1 of .* has no field 'text'; did you mean 'txt'.*it has txt"),
        ("number.jsonl", b'{"text": 3}\n', "is int, not text"),
        ("broken.txt.gz", b"no gzip", "cannot read"),
        ("broken.txt.xz", b"no xz at all", "cannot read"),
        ("broken.txt.bz2", b"no bz2", "cannot read"),
        ("broken.parquet", b"no parquet", "cannot read"),
    ],
)
def test_broken_input_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as told:
        list(documents(tmp_path / name))
    assert name in str(told.value)


# -- pairs -------------------------------------------------------------------------------------------------


def test_pairs_come_from_named_fields_and_one_without_an_answer_is_left_out(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [("2+2?", "4"), ("?", ""), ("?", None), (None, "5")]
    path.write_bytes(lines_of(*({"q": question, "a": answer} for question, answer in rows)))
    assert list(pairs(path, prompt="q", answer="a")) == [("2+2?", "4"), ("", "5")]


def test_pairs_that_lack_a_field_or_every_answer_are_named(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_bytes(lines_of({"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?"}))
    with pytest.raises(DataError, match=r"line 2 of .* has no field 'answer'"):
        list(pairs(path))
    path.write_bytes(lines_of({"prompt": "2+2?", "answer": " "}))
    with pytest.raises(DataError, match="there is no answer in"):
        list(pairs(path))


def test_plain_text_is_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt is plain text; prompts and answers come as JSON lines"):
        list(pairs(tmp_path / "a.txt"))


# -- what is shipped, how far, and changed -----------------------------------------------------------------


def test_the_shipped_corpus_is_forty_two_documents():
    found = list(documents(shipped()))
    assert len(found) == 42 and sum(map(len, found)) > 5_000_000


def test_a_corpus_that_is_not_shipped_is_named_with_the_nearest():
    with pytest.raises(DataError, match="no corpus 'shakespear' comes with esolm; did you mean 'shakespeare'"):
        shipped("shakespear")


def test_a_meter_tells_the_bytes_read_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 64)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(*[{"text": 50 * name}] * 10))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"text"))
    meter = Meter(tmp_path)
    read = [meter.read for _ in documents(tmp_path, meter=meter)]
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert meter.read == meter.total == sum(sizes)
    assert read == sorted(read) and 0 < read[0] <= 128 and sizes[0] < read[10] <= sizes[0] + 128
    assert Meter("hf:someone/something").total is None


def test_a_fingerprint_tells_that_text_names_or_files_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 4)
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text("0123456789")
    seen = {fingerprint(tmp_path)}
    assert seen == {fingerprint(tmp_path)}
    for change in (
        lambda: paths[0].write_text("x123456789"),
        lambda: paths[1].write_text("012345678x"),
        lambda: paths[1].write_text("0123 more 678x"),
        lambda: paths[1].rename(tmp_path / "c.txt"),
        lambda: (tmp_path / "d.txt").write_text("d"),
    ):
        change()
        assert fingerprint(tmp_path) not in seen
        seen.add(fingerprint(tmp_path))


def test_a_fingerprint_does_not_depend_on_where_a_folder_lies(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a")
    assert fingerprint(tmp_path / "here") == fingerprint(tmp_path / "there") != ""


def test_what_is_not_there_has_no_fingerprint(tmp_path):
    assert fingerprint(tmp_path / "absent") == fingerprint("hf:someone/something") == ""


@pytest.mark.parametrize(
    ("library", "source"), [("datasets", "hf:x"), ("zstandard", "a.txt.zst"), ("pyarrow.parquet", "a.parquet")]
)
def test_a_library_that_is_not_installed_is_named_with_the_extra(tmp_path, monkeypatch, library, source):
    monkeypatch.setitem(sys.modules, library, None)
    path = tmp_path / source
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=rf"needs .*{library.partition('.')[0]}.*pip install 'esolm\[data\]'"):
        list(documents(source if source.startswith("hf:") else path))
