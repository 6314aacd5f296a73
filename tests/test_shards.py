"""Tokens on disk: nothing is lost, a folder is there whole or not at all, and damage is found."""

import errno
import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import models

from esolm import shards as module
from esolm import tokenizer as tokenizer_module
from esolm.corpus import DataError, Meter
from esolm.shards import TokenData, tokenize, tokenize_pairs
from esolm.tokenizer import Tokenizer

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


def numbered(sizes: list[int]) -> TokenData:
    """Documents whose tokens are 0, 1, 2 ..., none twice, so that a token says where it comes from."""
    ends = np.cumsum(sizes)
    spans = np.stack((ends - sizes, ends - sizes, ends), axis=1)
    shards = [np.arange(ends[-1])[: ends[0] + 1], np.arange(ends[-1])[ends[0] + 1 :]]  # a document lies in both
    size = int(ends[-1])
    return TokenData(shards=shards, spans=spans, end_id=size, vocab_size=size + 2, tokenizer_digest="")


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_documents_are_split_whole_near_the_share_and_always_in_the_same_way(sizes, share, seed):
    data = numbered(sizes)
    learned, held_out = data.split(share, seed=seed)
    assert sorted(learned.spans.tolist() + held_out.spans.tolist()) == data.spans.tolist()
    assert learned.num_documents and held_out.num_documents
    assert abs(held_out.num_tokens - share * sum(sizes)) <= max(sizes)
    assert data.split(share, seed=seed)[1].spans.tolist() == held_out.spans.tolist()


def test_another_seed_holds_out_other_documents():
    data = numbered([5] * 40)
    assert data.split(0.2, seed=0)[1].spans.tolist() != data.split(0.2, seed=1)[1].spans.tolist()


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


def test_of_two_that_tokenize_the_same_text_the_second_takes_what_the_first_made(tmp_path):
    def meanwhile():
        tokenize(TEXTS[:1], BYTES, tmp_path / "data")
        yield "late"

    with pytest.MonkeyPatch.context() as patch:
        pids = itertools.count()  # one process of its own for each
        patch.setattr(module.os, "getpid", lambda: next(pids))
        assert stream(tokenize(meanwhile(), BYTES, tmp_path / "data")) == [*b"first text", 256]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


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


def test_documents_that_do_not_fill_the_tokens_are_found(tmp_path, tokens):
    path = tmp_path / "data" / "documents.npy"
    spans = np.load(path)
    spans[1, 0] -= 1
    np.save(path, spans)
    with pytest.raises(DataError, match="do not fill the tokens"):
        TokenData.open(tmp_path / "data")


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


def test_an_interrupted_or_failed_tokenization_leaves_nothing(tmp_path, monkeypatch):
    def broken():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(broken(), BYTES, tmp_path / "data")
    monkeypatch.setattr(module.np, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        tokenize(TEXTS, BYTES, tmp_path / "data")
    assert not list(tmp_path.iterdir())


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
