"""Batches: nothing is lost, nothing comes twice, and a batch is a function of (seed, step)."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esolm.algorithms import BD3LM, MDLM, EsoLM
from esolm.corpus import DataError
from esolm.data import Loader, Mixture, permuted
from esolm.noise import Noise
from esolm.shards import TokenData
from esolm.tokenizer import Tokenizer
from esolm.tokenizing import tokenize, tokenize_pairs

BYTES = Tokenizer.bytes()
TEXTS = ["first text", "the second", "x", "a fourth, longer than the others"]


@pytest.fixture
def tokens(tmp_path) -> TokenData:
    return tokenize(TEXTS, BYTES, tmp_path / "data")


def stream(data: TokenData) -> list[int]:
    return [token for number in range(data.num_documents) for token in data.document(number).tolist()]


def numbered(sizes: list[int]) -> TokenData:
    """Documents whose tokens are 0, 1, 2 ..., none twice, so that a token says where it comes from."""
    ends = np.cumsum(sizes)
    spans = np.stack((ends - sizes, ends - sizes, ends), axis=1)
    shards = [np.arange(ends[-1])[: ends[0] + 1], np.arange(ends[-1])[ends[0] + 1 :]]  # a document lies in both
    size = int(ends[-1])
    return TokenData(
        shards=shards,
        sizes=np.array([len(shard) for shard in shards]),
        documents=spans,
        parts=np.array([[0, len(spans), 0, size]]),
        end_id=size,
        vocab_size=size + 2,
        tokenizer_digest="",
    )


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


def test_behind_an_answer_stand_none_to_all_ends_of_text_there_is_room_for(tmp_path):
    """A model that never saw what follows an answer wrote letters there, in diffusion's order, and read them."""
    loader = Loader(tokenize_pairs([("ab", "c")] * 50, BYTES, tmp_path / "pairs"), length=9)
    batches = [loader.batch(step, 0, 50, 50) for step in range(8)]
    counts = np.bincount(torch.cat([batch.valid.sum(1) for batch in batches]), minlength=10)
    assert not counts[:4].any() and (abs(counts[4:] - 400 / 6) < 40).all()  # five standard deviations
    for batch in batches:
        assert batch.tokens.tolist() == [[*b"abc", *[256] * 6]] * 50 and batch.given.sum() == 100
    assert torch.equal(Loader(loader.data, length=9).batch(3, 0, 50, 50).valid, batches[3].valid)
    assert not torch.equal(batches[3].valid, batches[4].valid)
    assert all((batch.valid.sum(1) == 4).all() for batch in loader.windows(50))


def test_a_long_answer_keeps_its_beginning(tmp_path):
    data = tokenize_pairs([("prompt", "a long answer")], BYTES, tmp_path / "pairs")
    with pytest.warns(UserWarning, match="1 of 1 pairs"):
        (batch,) = Loader(data, length=6).windows(1)
    assert bytes(batch.tokens[0].tolist()) == b"a long" and not batch.given.any()


def test_pairs_that_fit_warn_of_nothing(tmp_path, recwarn):
    data = tokenize_pairs([("prompt", "answer")], BYTES, tmp_path / "pairs")
    assert Loader(data, length=13).num_cut == 0 and not recwarn.list


@pytest.mark.parametrize("algorithm", [MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM(variant="B")], ids=repr)
def test_the_prompt_of_a_pair_is_never_masked_and_only_its_answer_is_asked_for(tmp_path, algorithm):
    data = tokenize_pairs([(f"{n}+{n}=", f"{n + n}") for n in range(10)], BYTES, tmp_path / "pairs")
    batch, masked = Loader(data, length=8).batch(0, 0, 10, 10), set()
    for step in range(20):
        noise = Noise(seed=0, step=step, start=0, stop=10, total=10)
        for view in algorithm.views(batch, noise, BYTES.mask_id):
            masked |= {int(place) for place in view.positions[view.tokens == BYTES.mask_id]}
            asked = {int(place) for place in view.positions[view.weights > 0]}
            assert not asked & set(range(4)) and asked <= set(range(8))
    assert masked & set(range(4)) == set() and {4, 5} <= masked


# -- mixtures ----------------------------------------------------------------------------------------------


def mixed(weights: list[float], *, seed: int = 0) -> Mixture:
    return Mixture(
        [Loader(replace(numbered([40 + n]), end_id=99), length=3, seed=seed) for n in range(len(weights))],
        weights,
        seed=seed,
    )


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_block_ends_with_the_exact_shares_and_no_row_of_a_corpus_is_left_out(weights, seed):
    mixture = mixed(weights, seed=seed)
    count = 3 * mixture._block
    corpora, places = mixture.assigned(np.arange(count))
    for corpus, weight in enumerate(weights):
        mine = places[corpora == corpus]
        assert abs(len(mine) - count * weight / sum(weights)) < 2
        assert sorted(mine.tolist()) == list(range(len(mine)))


def test_the_corpus_of_a_row_is_a_function_of_its_number_however_it_is_asked_for():
    mixture = mixed([3.0, 1.0])
    corpora, places = mixture.assigned(np.arange(10**12, 10**12 + 1000))
    for at in (0, 1, 517, 999):
        assert mixture.assigned(np.array([10**12 + at])).ravel().tolist() == [corpora[at], places[at]]
    assert abs((corpora == 0).mean() - 0.75) < 0.01 and (np.diff(corpora) != 0).sum() > 200  # well mixed


@given(cuts=st.sets(st.integers(1, 11), max_size=4), step=st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_a_batch_of_a_mixture_is_the_same_however_it_is_cut(cuts, step):
    mixture, places = mixed([2.0, 5.0, 1.0], seed=3), [0, *sorted(cuts), 12]
    parts = [mixture.batch(step, start, stop, 12).tokens for start, stop in pairwise(places)]
    assert torch.equal(torch.cat(parts), mixture.batch(step, 0, 12, 12).tokens)
    assert torch.equal(mixed([2.0, 5.0, 1.0], seed=3).batch(step, 0, 12, 12).tokens, torch.cat(parts))


def test_windows_of_a_mixture_are_by_weight_and_show_each_corpus_whole():
    first, second = numbered([90]), replace(numbered([30]), vocab_size=200)
    second = replace(second, end_id=90, shards=[np.arange(100, 130)], sizes=np.array([30]))
    mixture = Mixture([Loader(first, length=3), Loader(second, length=3)], [1.0, 1.0])
    rows = torch.cat([batch.tokens for batch in mixture.windows(7)])
    assert len(rows) == 60
    assert set(rows.ravel().tolist()) >= set(range(100, 130))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, 1e-9]]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        Mixture([Loader(numbered([9]), length=3)] * 2, weights)
