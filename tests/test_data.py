"""Tokens on disk and batches: nothing is lost, nothing comes twice, and a batch is a function of (seed, step)."""

import errno

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm import data as data_module
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


def test_a_huge_document_is_cut_where_no_token_lies_across(tmp_path, monkeypatch):
    text = "one two\n\nthree  four\nfive\n six seven " * 50
    learned = Tokenizer.train([text], 275)
    monkeypatch.setattr(data_module, "_PIECE", 40)
    assert len(list(data_module._pieces(text))) > 10
    cut = tokenize([text], learned, tmp_path / "cut")
    assert cut.document(0).tolist() == [*learned.encode(text), learned.end_id]


@given(count=st.integers(1, 500), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(count, seed):
    assert sorted(permuted(place, count, seed, 0) for place in range(count)) == list(range(count))


def test_epochs_have_orders_of_their_own():
    orders = [[permuted(place, 50, 0, epoch) for place in range(50)] for epoch in (0, 1)]
    assert orders[0] != orders[1] != list(range(50))


@given(length=st.integers(1, 20), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_an_epoch_shows_no_token_twice_and_leaves_out_less_than_a_window(tmp_path_factory, length, seed):
    data = tokenize(TEXTS, BYTES, tmp_path_factory.mktemp("epoch") / "data")
    loader = Loader(data, length=length, seed=seed)
    whole = np.array(stream(data))
    starts = []
    for row in range(loader.num_rows):
        found = loader.batch(row, 0, 1, 1).tokens[0].numpy()
        rolled = [start for start in range(len(whole)) if (np.roll(whole, -start)[:length] == found).all()]
        starts.append(rolled)
    assert all(starts)
    assert loader.num_rows == len(whole) // length


def test_a_batch_does_not_depend_on_how_it_is_cut_or_on_what_came_before(tokens):
    loader, again = (Loader(tokens, length=7, seed=3) for _ in range(2))
    for step in range(5):
        loader.batch(step, 0, 4, 4)
    whole = again.batch(5, 0, 4, 4).tokens
    parts = torch.cat([loader.batch(5, start, start + 2, 4).tokens for start in (0, 2)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, Loader(tokens, length=7, seed=4).batch(5, 0, 4, 4).tokens)


def test_windows_show_every_token_once_in_order_and_pad_the_last(tokens):
    loader = Loader(tokens, length=9)
    shown = [batch.tokens[batch.valid] for batch in loader.windows(2)]
    assert torch.cat(shown).tolist() == stream(tokens)


def test_documents_are_split_whole_and_always_in_the_same_way(tokens):
    learned, held_out = tokens.split(0.3, seed=1)
    texts = {tuple(part.document(n)) for part in (learned, held_out) for n in range(part.num_documents)}
    assert texts == {tuple(tokens.document(n)) for n in range(4)}
    assert learned.num_documents and held_out.num_documents
    assert learned.num_tokens + held_out.num_tokens == tokens.num_tokens
    assert tokens.split(0.3, seed=1)[0].spans.tolist() == learned.spans.tolist()


def test_a_single_document_is_cut_in_two(tmp_path):
    data = tokenize(["0123456789" * 10], BYTES, tmp_path / "one")
    learned, held_out = data.split(0.1)
    assert stream(learned) + stream(held_out) == stream(data)
    assert held_out.num_tokens == 10


def test_a_pair_is_prompt_given_answer_scored_and_padding(tmp_path):
    data = tokenize_pairs([("2+2=", "4"), ("long prompt ", "answer")], BYTES, tmp_path / "pairs")
    (batch,) = Loader(data, length=10).windows(8)
    assert batch.tokens[0].tolist() == [*b"2+2=4", *[256] * 5]
    assert batch.given[0].tolist() == [True] * 4 + [False] * 6
    assert batch.valid[0].tolist() == [True] * 6 + [False] * 4
    assert batch.tokens[1].tolist() == [*b"pt answer"[-9:], 256]
    assert batch.given[1].tolist() == [True] * 3 + [False] * 7


def test_a_long_answer_keeps_its_beginning(tmp_path):
    data = tokenize_pairs([("prompt", "a long answer")], BYTES, tmp_path / "pairs")
    (batch,) = Loader(data, length=6).windows(1)
    assert bytes(batch.tokens[0].tolist()) == b"a long" and not batch.given.any()


def test_what_is_there_is_used_again_and_another_text_or_tokenizer_is_refused(tmp_path, tokens):
    def never():
        raise AssertionError("read again")
        yield

    assert stream(tokenize(never(), BYTES, tmp_path / "data")) == stream(tokens)
    with pytest.raises(DataError, match="another text: remove it"):
        tokenize(TEXTS, BYTES, tmp_path / "data", source="other")
    with pytest.raises(DataError, match="another tokenizer"):
        tokenize(TEXTS, Tokenizer.train(["aaa bbb aaa bbb"], 259), tmp_path / "data")


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


def test_text_shorter_than_a_window_is_said(tokens):
    with pytest.raises(DataError, match="fewer than one window of 1000: give more, or a length of"):
        Loader(tokens, length=1000)
    with pytest.raises(ValueError, match="length must be at least 1"):
        Loader(tokens, length=0)


def test_nothing_to_tokenize_is_said(tmp_path):
    with pytest.raises(DataError, match="no text to tokenize"):
        tokenize([], BYTES, tmp_path / "data")
