"""Tokens on disk: nothing is lost, a folder is there whole or not at all, and damage is found."""

import errno
import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import models

from esolm import seal, shards
from esolm import tokenizer as tokenizer_module
from esolm import tokenizing as module
from esolm.corpus import DataError, Meter
from esolm.shards import TokenData
from esolm.tokenizer import Tokenizer
from esolm.tokenizing import tokenize, tokenize_pairs
from test_data import numbered

BYTES = Tokenizer.bytes()
TEXTS = ["first text", "the second", "x", "a fourth, longer than the others"]


@pytest.fixture
def tokens(tmp_path) -> TokenData:
    return tokenize(TEXTS, BYTES, tmp_path / "data")


def stream(data: TokenData) -> list[int]:
    return [token for number in range(data.num_documents) for token in data.document(number).tolist()]


def test_documents_come_back_each_closed_by_end_of_text(tokens):
    assert tokens.num_documents == 4
    for number, text in enumerate(TEXTS):
        assert tokens.document(number).tolist() == [*BYTES.encode(text), BYTES.end_id]


def test_shards_are_many_and_read_as_one(tmp_path, tokens):
    small = tokenize(TEXTS, BYTES, tmp_path / "small", shard_tokens=8)
    assert len(small.shards) > 1 and stream(small) == stream(tokens)


def test_a_huge_document_has_the_tokens_it_has_whole(tmp_path, monkeypatch):
    text = "one two\n\nthree  four\nfive\n six seven " * 50
    learned = Tokenizer.train([text], 275)
    monkeypatch.setattr(tokenizer_module, "_PIECE", 40)
    cut = tokenize([text], learned, tmp_path / "cut")
    assert cut.document(0).tolist() == [*learned.encode(text), learned.end_id]


def test_groups_of_documents_are_large_or_one_document_and_lose_none(monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 12)
    records = [("", text) for text in TEXTS]
    groups = list(module._groups(iter(records)))
    assert [len(group) for group in groups] == [2, 2] and [*groups[0], *groups[1]] == records


def spans(data: TokenData) -> list[list[int]]:
    return data.spans(np.arange(data.num_documents)).tolist()


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_documents_are_split_whole_near_the_share_and_always_in_the_same_way(sizes, share, seed):
    data = numbered(sizes)
    learned, held_out = data.split(share, seed=seed)
    assert sorted(spans(learned) + spans(held_out)) == spans(data)
    assert learned.num_documents and held_out.num_documents
    assert abs(held_out.num_tokens - share * sum(sizes)) <= max(sizes)
    assert spans(data.split(share, seed=seed)[1]) == spans(held_out)


def test_another_seed_holds_out_other_documents():
    data = numbered([5] * 40)
    assert spans(data.split(0.2, seed=0)[1]) != spans(data.split(0.2, seed=1)[1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_of_zero_to_one_is_refused(tokens, share):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        tokens.split(share)


def test_a_single_pair_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="give more of them"):
        tokenize_pairs([("a", "b")], BYTES, tmp_path / "pairs").split(0.5)


def test_a_single_document_is_cut_in_two(tmp_path):
    data = tokenize(["0123456789" * 10], BYTES, tmp_path / "one")
    learned, held_out = data.split(0.1)
    assert stream(learned) + stream(held_out) == stream(data)
    assert held_out.num_tokens == 10


def test_what_is_there_is_used_again_and_another_text_or_tokenizer_is_refused(tmp_path, tokens):
    def never():
        raise AssertionError("read again")
        yield

    assert stream(tokenize(never(), BYTES, tmp_path / "data")) == stream(tokens)
    with pytest.raises(DataError, match="another text: remove it"):
        tokenize(TEXTS, BYTES, tmp_path / "data", source="other")
    with pytest.raises(DataError, match="another tokenizer"):
        tokenize(TEXTS, Tokenizer.train(["aaa bbb aaa bbb"], 259), tmp_path / "data")


def test_text_that_has_changed_is_refused_and_text_that_is_not_there_to_compare_is_used(tmp_path):
    folder = tmp_path / "data"
    made = tokenize(TEXTS, BYTES, folder, fingerprint="1")
    for same in ("1", ""):
        assert stream(tokenize([], BYTES, folder, fingerprint=same)) == stream(made)
    with pytest.raises(DataError, match="the text has changed since"):
        tokenize(TEXTS, BYTES, folder, fingerprint="2")


def test_documents_are_not_taken_for_pairs(tmp_path, tokens):
    with pytest.raises(DataError, match="another text"):
        tokenize_pairs([("a", "b")], BYTES, tmp_path / "data")


def test_of_two_that_tokenize_the_same_text_the_second_waits_and_takes_what_the_first_made(tmp_path):
    waiting: list[threading.Thread] = []
    taken: list[TokenData] = []

    def first():
        yield "first text"
        second = threading.Thread(target=lambda: taken.append(tokenize(never(), BYTES, tmp_path / "data")))
        second.start()
        second.join(0.2)
        waiting.append(second)
        assert second.is_alive() and not taken

    def never():
        raise AssertionError("read again")
        yield

    tokenize(first(), BYTES, tmp_path / "data")
    waiting[0].join(60)
    assert stream(taken[0]) == [*b"first text", 256]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MANY = [f"{n}. a text of some length" for n in range(400)]
TOKENIZE = """if True:
    import os, signal, sys
    from pathlib import Path
    from esolm.tokenizer import Tokenizer
    from esolm import tokenizing
    tokenizing._GROUP = 100
    def texts():
        for n in range(400):
            if n == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"{n}. a text of some length"
    tokenizing.tokenize(texts(), Tokenizer.bytes(), Path(sys.argv[1]), fingerprint="1", shard_tokens=1000)
"""


def test_what_is_killed_goes_on_with_the_shards_that_are_whole_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    tokenize(MANY, BYTES, tmp_path / "straight", fingerprint="1", shard_tokens=1000)
    for killed in (150, 300):
        command = [sys.executable, "-c", TOKENIZE, str(tmp_path / "data"), str(killed)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    encoded: list[str] = []
    encode = Tokenizer.encode_arrays

    def counted(self, texts, dtype):
        encoded.extend(texts := list(texts))
        return encode(self, texts, dtype)

    monkeypatch.setattr(Tokenizer, "encode_arrays", counted)
    tokenize(MANY, BYTES, tmp_path / "data", fingerprint="1", shard_tokens=1000)
    assert contents(tmp_path / "data") == contents(tmp_path / "straight")
    assert len(encoded) < 2 * 160  # a prompt and a text each
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "straight"]
    TokenData.open(tmp_path / "data", digests=True)


@pytest.mark.parametrize("change", ["text", "flip", "table"])
def test_an_earlier_try_of_another_text_or_with_a_damaged_shard_is_not_gone_on_with(tmp_path, change):
    command = [sys.executable, "-c", TOKENIZE, str(tmp_path / "data"), "300"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    making = tmp_path / ".making-data"
    if change == "flip":
        content = bytearray((making / "tokens-00001.bin").read_bytes())
        content[7] ^= 1
        (making / "tokens-00001.bin").write_bytes(content)
    if change == "table":
        (making / "documents.npy").write_bytes((making / "documents.npy").read_bytes()[:200])
    texts = [text.upper() for text in MANY] if change == "text" else MANY
    mark = "2" if change == "text" else "1"
    tokenize(texts, BYTES, tmp_path / "data", fingerprint=mark, shard_tokens=1000)
    tokenize(texts, BYTES, tmp_path / "straight", fingerprint=mark, shard_tokens=1000)
    assert contents(tmp_path / "data") == contents(tmp_path / "straight")


def test_the_folder_holds_the_tokenizer_too(tmp_path, tokens):
    assert Tokenizer.load(tmp_path / "data").digest == tokens.tokenizer_digest == BYTES.digest


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.npy", "index.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_is_found_on_opening(tmp_path, tokens, name, damage):
    path = tmp_path / "data" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match="tokenize the text again"):
        TokenData.open(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("index.json", b'"end_id"', b'"end_ie"'), ("index.json", b"uint16", b"uint61"), ("documents.npy", b"i8", b"iq")],
)
def test_damage_that_keeps_the_size_is_found_where_it_would_be_read(tmp_path, tokens, name, old, new):
    path = tmp_path / "data" / name
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(DataError, match="tokenize the text again"):
        TokenData.open(tmp_path / "data")


def test_documents_that_do_not_fill_the_tokens_are_found_at_once_or_where_they_are_read(tmp_path, tokens):
    path = tmp_path / "data" / "documents.npy"
    spans = np.load(path)
    for row, column, value in ((3, 2, 1), (0, 0, 1)):
        damaged = spans.copy()
        damaged[row, column] += value
        np.save(path, damaged)
        with pytest.raises(DataError, match="do not fill the tokens"):
            TokenData.open(tmp_path / "data")
    spans[1] = 10**6
    np.save(path, spans)
    data = TokenData.open(tmp_path / "data")
    assert len(data.document(0))
    with pytest.raises(DataError, match="do not fill the tokens"):
        data.document(1)
    with pytest.raises(DataError, match="do not fill the tokens"):
        data.split(0.5)


def test_all_documents_are_checked_when_asked_for(tmp_path, tokens):
    """Also where the digests are those of the damage."""
    folder = tmp_path / "data"
    spans = np.load(folder / "documents.npy")
    spans[1, 0] -= 1
    np.save(folder / "documents.npy", spans)
    seal.seal(folder, sorted(path.name for path in folder.iterdir() if path.name != "manifest.json"), step=0)
    TokenData.open(folder)
    with pytest.raises(DataError, match="do not fill the tokens"):
        TokenData.open(folder, digests=True)


def test_documents_beyond_four_thousand_are_split_in_runs_without_reading_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_RUNS", 8)
    data = numbered([3, 1, 4, 1, 5, 9, 2, 6] * 20)
    learned, held_out = data.split(0.25, seed=1)
    assert sorted(spans(learned) + spans(held_out)) == spans(data) and len(held_out.parts) == 2
    for part in (learned, held_out):
        assert stream(part) == part.stream(0, part.num_tokens).tolist()
        assert part.stream(part.num_tokens - 2, 5).tolist() == (stream(part) * 2)[part.num_tokens - 2 :][:5]


def test_a_token_that_is_no_text_is_found_when_it_is_read(tmp_path, tokens):
    path = tmp_path / "data" / "tokens-00000.bin"
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])
    with pytest.raises(DataError, match="token 65535 is not in the vocabulary of 258"):
        TokenData.open(tmp_path / "data").document(0)


def test_a_flipped_bit_is_found_when_asked_for(tmp_path, tokens):
    path = tmp_path / "data" / "tokens-00000.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        TokenData.open(tmp_path / "data", digests=True)


def test_an_interrupted_or_failed_tokenization_leaves_nothing_or_what_the_next_goes_on_with(tmp_path, monkeypatch):
    def broken():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(broken(), BYTES, tmp_path / "data")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module.seal, "seal", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        tokenize(TEXTS, BYTES, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert stream(tokenize(TEXTS, BYTES, tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_nothing_to_tokenize_is_said(tmp_path):
    with pytest.raises(DataError, match="no text to tokenize"):
        tokenize([], BYTES, tmp_path / "data")
    with pytest.raises(DataError, match="text 1 is empty"):
        tokenize(["a", ""], BYTES, tmp_path / "data")
    with pytest.raises(DataError, match="got one str: put it into a list"):
        tokenize("text", BYTES, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_tokenizing_shows_what_it_does(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    tokenize(TEXTS, BYTES, tmp_path / "data", console=console)
    assert "1 documents, 11 tokens" in console.file.getvalue()  # drawn at the first, then ten times a second


def test_a_large_vocabulary_has_four_bytes_a_token(tmp_path):
    letters = {"x": 0, **{f"word{n}": n for n in range(1, 70_000)}}
    large = Tokenizer.from_json(Backend(models.WordLevel(letters, unk_token="x")).to_str())
    data = tokenize(["word69999"], large, tmp_path / "data")
    assert data.document(0).tolist() == [69_999, 70_000] and data.shards[0].dtype == np.uint32


def test_the_time_left_is_told_where_the_size_of_the_text_is_known(tmp_path, monkeypatch):
    """After a quarter of the text in two seconds, six are left."""
    clock = iter([0.0, *[2.0] * 9])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    (tmp_path / "text.txt").write_text("1234" * 25)
    meter = Meter(tmp_path / "text.txt")
    meter.read = 25
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    tokenize(["1234567"], BYTES, tmp_path / "data", console=console, meter=meter)
    assert "1 documents, 8 tokens, 4 tokens/s, 25%, 0:00:06 left" in console.file.getvalue()
