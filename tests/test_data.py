"""Tokens on disk and batches: nothing is lost, nothing comes twice, and a batch is a function of (seed, step)."""

import errno
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import models

from esolm import data as data_module
from esolm import tokenizer as tokenizer_module
from esolm.corpus import DataError
from esolm.data import Loader, TokenData, permuted, tokenize, tokenize_pairs
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
    monkeypatch.setattr(data_module, "_GROUP", 12)
    records = [("", text) for text in TEXTS]
    groups = list(data_module._groups(iter(records)))
    assert [len(group) for group in groups] == [2, 2] and [*groups[0], *groups[1]] == records


def numbered(sizes: list[int]) -> TokenData:
    """Documents whose tokens are 0, 1, 2 ..., none twice, so that a token says where it comes from."""
    ends = np.cumsum(sizes)
    spans = np.stack((ends - sizes, ends - sizes, ends), axis=1)
    shards = [np.arange(ends[-1])[: ends[0] + 1], np.arange(ends[-1])[ends[0] + 1 :]]  # a document lies in both
    size = int(ends[-1])
    return TokenData(shards=shards, spans=spans, end_id=size, vocab_size=size + 2, tokenizer_digest="")


@given(count=st.integers(1, 500), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(count, seed):
    assert sorted(permuted(np.arange(count), count, seed, 0).tolist()) == list(range(count))


def test_a_permutation_of_very_many_is_made_for_the_places_asked_for_only():
    count, places = 10**12 + 39, np.arange(5000) * 10**8
    found = permuted(places, count, 1)
    assert len(set(found.tolist())) == 5000 and 0 <= found.min() < found.max() < count
    assert np.array_equal(permuted(places[7:9], count, 1), found[7:9])


def test_a_permutation_leaves_no_trace_of_the_order_it_shuffles():
    """Over many keys every place goes everywhere equally often, and neighbours are no longer neighbours."""
    moved = np.array([permuted(np.arange(16), 16, key) for key in range(4000)])
    counts = np.array([np.bincount(column, minlength=16) for column in moved.T])
    assert abs(counts - 250).max() < 80  # five standard deviations
    steps = np.bincount(np.diff(moved, axis=1).ravel() % 16, minlength=16)[1:]
    assert abs(steps / steps.mean() - 1).max() < 0.08


def test_epochs_have_orders_of_their_own():
    loader = Loader(numbered([50]), length=1)
    orders = [[int(loader.batch(50 * epoch + n, 0, 1, 1).tokens) for n in range(50)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1] != list(range(50)) != orders[0]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    length=st.integers(1, 20),
    total=st.integers(1, 7),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_shows_every_token_once_but_for_less_than_a_window(sizes, length, total, epoch, seed):
    size = sum(sizes)
    assume(size >= length)
    loader = Loader(numbered(sizes), length=length, seed=seed)
    rows = range(epoch * loader.num_rows, (epoch + 1) * loader.num_rows)
    shown = [loader.batch(n // total, n % total, n % total + 1, total).tokens[0].numpy() for n in rows]
    assert len(set(np.concatenate(shown).tolist())) == size // length * length
    for row in shown:
        assert ((row - row[0]) % size == np.arange(length)).all()  # a window of the stream, which is a circle


def test_the_grid_of_windows_moves_every_epoch():
    loader = Loader(numbered([40]), length=10)
    grids = {int(loader.batch(epoch, 0, 4, 4).tokens[0, 0]) % 10 for epoch in range(12)}
    assert len(grids) > 4


@given(cuts=st.sets(st.integers(1, 11), max_size=4), step=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_the_same_however_it_is_cut(cuts, step):
    loader, places = Loader(numbered([9, 14, 12]), length=4, seed=3), [0, *sorted(cuts), 12]
    parts = [loader.batch(step, start, stop, 12).tokens for start, stop in pairwise(places)]
    assert torch.equal(torch.cat(parts), loader.batch(step, 0, 12, 12).tokens)


def test_a_batch_does_not_depend_on_what_came_before_but_on_the_seed(tokens):
    loader, fresh, other = (Loader(tokens, length=7, seed=seed) for seed in (3, 3, 4))
    for step in range(5):
        loader.batch(step, 0, 4, 4)
    assert torch.equal(loader.batch(5, 0, 4, 4).tokens, fresh.batch(5, 0, 4, 4).tokens)
    assert not torch.equal(fresh.batch(5, 0, 4, 4).tokens, other.batch(5, 0, 4, 4).tokens)


def test_pairs_come_once_an_epoch(tmp_path):
    data = tokenize_pairs([(f"{n}", "x") for n in range(10)], BYTES, tmp_path / "pairs")
    batch = Loader(data, length=3).batch(0, 0, 10, 10)
    assert sorted(batch.tokens[:, 0].tolist()) == list(b"0123456789") != batch.tokens[:, 0].tolist()
    assert batch.given.tolist() == [[True, False, False]] * 10


def test_windows_show_every_token_once_in_order_and_pad_the_last(tokens):
    loader = Loader(tokens, length=9)
    shown = [batch.tokens[batch.valid] for batch in loader.windows(2)]
    assert torch.cat(shown).tolist() == stream(tokens)
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        next(loader.windows(0))


def test_text_shorter_than_a_window_is_scored_padded_but_gives_no_batch(tokens):
    """The part held out of a small text is often that short."""
    loader = Loader(tokens, length=1000)
    (batch,) = loader.windows(4)
    assert batch.tokens[batch.valid].tolist() == stream(tokens)
    with pytest.raises(DataError, match=r"has 57 tokens, fewer than one window of 1000: .* at most 57"):
        loader.batch(0, 0, 1, 1)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Loader(tokens, length=0)


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


def test_a_pair_is_prompt_given_answer_scored_and_padding(tmp_path):
    data = tokenize_pairs([("2+2=", "4"), ("long prompt ", "answer")], BYTES, tmp_path / "pairs")
    with pytest.warns(UserWarning, match="1 of 2 pairs are longer than 10 tokens and are cut.*a length of 19 holds"):
        loader = Loader(data, length=10)
    (batch,) = loader.windows(8)
    assert batch.tokens[0].tolist() == [*b"2+2=4", *[256] * 5]
    assert batch.given[0].tolist() == [True] * 4 + [False] * 6
    assert batch.valid[0].tolist() == [True] * 6 + [False] * 4
    assert batch.tokens[1].tolist() == [*b"pt answer"[-9:], 256]
    assert batch.given[1].tolist() == [True] * 3 + [False] * 7
    assert loader.num_cut == 1


def test_a_long_answer_keeps_its_beginning(tmp_path):
    data = tokenize_pairs([("prompt", "a long answer")], BYTES, tmp_path / "pairs")
    with pytest.warns(UserWarning, match="1 of 1 pairs"):
        (batch,) = Loader(data, length=6).windows(1)
    assert bytes(batch.tokens[0].tolist()) == b"a long" and not batch.given.any()


def test_pairs_that_fit_warn_of_nothing(tmp_path, recwarn):
    data = tokenize_pairs([("prompt", "answer")], BYTES, tmp_path / "pairs")
    assert Loader(data, length=13).num_cut == 0 and not recwarn.list


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
        pids = iter(range(2))
        patch.setattr(data_module.os, "getpid", lambda: next(pids))
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
    monkeypatch.setattr(data_module.np, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
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
