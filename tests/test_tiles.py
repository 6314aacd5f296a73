"""Attention in tiles: softmax over what is read and its gradients, however it is cut, and nothing of what nobody reads.

The other side is softmax of all scores in float64.
"""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm import tiles
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.attention import PADDING, Relation, attends, attention, relation_in_tiles
from esolm.noise import Noise
from esolm.tiles import attend, cut

LENGTH, TEXTS, MASK_ID = 96, 3, 9
NOISE = Noise(seed=1, step=0, start=0, stop=TEXTS, total=TEXTS)
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=8), EsoLM(variant="A", alpha_0=0.5), EsoLM(alpha_0=0.5)]


def views(algorithm, padding: int = 0):
    tokens = torch.randint(0, MASK_ID, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(tokens).bool()
    valid[1, LENGTH - padding :] = False
    return algorithm.views(Batch(tokens=tokens, given=~valid & False, valid=valid), NOISE, MASK_ID)


def tiled(view, dtype=torch.float32) -> Relation:
    return relation_in_tiles(view.stage, view.public, dtype)


VIEWS = pytest.mark.parametrize(
    "view",
    [view for algorithm in ALGORITHMS for padding in (0, 20) for view in views(algorithm, padding)],
    ids=lambda view: f"{view.term}-{view.tokens.shape[1]}",
)


def rule(view) -> torch.Tensor:
    """Which rows each row reads, but for padding rows, of which nothing is asked: none of them reads another."""
    mask, padding = attends(view.stage, view.public, view.stage, view.public), view.stage == PADDING
    return mask & ~(padding[:, :, None] & padding[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool))


def as_mask(parts, shape: torch.Size) -> torch.Tensor:
    """Which keys each row reads, by the tiles."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for tile in parts:
        reads = torch.ones(shape[0], tile.num_rows, tile.num_keys, dtype=torch.bool)
        for piece, added in tile.masks:
            reads[:, :, piece] &= added[:, 0] == 0
        at = int(tile.own)
        for span in tile.keys:
            size = span.stop - span.start
            mask[:, tile.rows, span] = reads[:, :, at : at + size]
            at += size
        if tile.own:
            mask[:, tile.rows, tile.rows] |= torch.eye(tile.num_rows, dtype=torch.bool)
    return mask


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def written_out(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v


def compare(mask, parts, dtype=torch.float32, tolerance=1e-5, rows=slice(None)):
    """Outputs and gradients of `rows` (the others are not asked for) against scores written out."""
    texts, count = mask.shape[:2]
    ours = [random((texts, 2, count, 8), seed, dtype) for seed in range(3)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    pull = random((texts, 2, count, 8), 3, dtype).detach()
    out, expected = attend(*ours, parts), written_out(*theirs, mask)
    out[:, :, rows].backward(pull[:, :, rows])
    expected[:, :, rows].backward(pull[:, :, rows].double())
    assert not out.isnan().any()
    for x, y in [
        (out[:, :, rows], expected[:, :, rows]),
        *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)),
    ]:
        assert (x.double() - y).norm() <= tolerance * y.norm()


@VIEWS
def test_the_tiles_of_a_view_are_the_rule(view, monkeypatch):
    monkeypatch.setattr(tiles, "_ROWS", 20)
    expected = rule(view)
    found = tiled(view).tiles
    assert len(found) > 3
    assert torch.equal(as_mask(found, expected.shape), expected)


@VIEWS
@pytest.mark.parametrize("kept", [0, 2**30], ids=["again", "kept"])
def test_tiles_are_softmax_attention_and_its_gradients(view, kept, monkeypatch):
    monkeypatch.setattr(tiles, "_SCORES_KEPT", kept)
    monkeypatch.setattr(tiles, "_ROWS", 32)
    monkeypatch.setattr(tiles, "_SCORES_AT_ONCE", 2 * 2 * 32 * 100)  # two texts at a time, or one
    compare(rule(view), tiled(view).tiles)


@given(st.integers(1, 7), st.sets(st.integers(1, 8), max_size=2), st.data())
@settings(deadline=None, max_examples=40)
def test_any_mask_cut_anywhere_gives_the_same(size, edges, data):
    rows = st.lists(st.booleans(), min_size=9, max_size=9)
    mask = torch.tensor(data.draw(st.lists(st.lists(rows, min_size=9, max_size=9), min_size=2, max_size=2)))
    mask |= torch.eye(9, dtype=torch.bool)  # every row reads itself
    before, tiles._ROWS = tiles._ROWS, size
    try:
        parts = cut(mask, sorted(edges), torch.float32)
    finally:
        tiles._ROWS = before
    assert torch.equal(as_mask(parts, mask.shape), mask)
    compare(mask, parts)


def test_tiles_in_bf16_are_near():
    (view,) = views(BD3LM(block_size=8))
    mask = rule(view)
    compare(mask, tiled(view, torch.bfloat16).tiles, torch.bfloat16, tolerance=0.02)


def test_heads_that_share_keys_are_given_them():
    (view,) = views(AR())
    q, k, v = (
        random((TEXTS, 4, LENGTH, 8), 0, torch.float32),
        *(random((TEXTS, 2, LENGTH, 8), s, torch.float32) for s in (1, 2)),
    )
    found = attention(q, k, v, tiled(view))
    torch.testing.assert_close(found, attention(q, k, v, Relation(causal=True)), rtol=0, atol=1e-5)


def test_a_tile_is_as_drawn(monkeypatch):
    monkeypatch.setattr(tiles, "_KEYS", 1)
    lines = re.findall(r"row \d ((?:[#.] ){4}[#.])", inspect.getdoc(tiles))
    mask = torch.tensor([[[sign == "#" for sign in line.split()] for line in lines]])
    (tile,) = cut(mask, (), torch.float32)
    assert tile.keys == (slice(0, 2), slice(3, 5))
    assert [piece for piece, _ in tile.masks] == [slice(1, 2), slice(3, 4)]  # of the keys that it computes
    assert not tile.own


def test_rows_that_nobody_wants_are_skipped_and_change_no_gradient(monkeypatch):
    monkeypatch.setattr(tiles, "_ROWS", 16)
    view = views(EsoLM(alpha_0=0.5))[1]
    who = tiled(view)
    wanted = (view.weights > 0).any(0)
    fewer = who.reading(wanted)
    masks = view.tokens.shape[1] - (LENGTH - 1)
    assert all(tile.rows.stop <= masks for tile in fewer.tiles) and len(fewer.tiles) < len(who.tiles)
    mask = rule(view)
    compare(mask, fewer.tiles, rows=slice(0, masks))


def test_tiles_leave_out_half_of_a_causal_pass_and_more_of_one_with_two_halves(monkeypatch):
    monkeypatch.setattr(tiles, "_ROWS", 8)
    monkeypatch.setattr(tiles, "_KEYS", 8)
    for algorithm, most in ((AR(), 0.56), (BD3LM(block_size=8), 0.36)):
        (view,) = views(algorithm)
        scores = sum(tile.num_rows * tile.num_keys for tile in tiled(view).tiles)
        assert scores <= most * view.tokens.shape[1] ** 2


def test_the_keys_of_a_tile_are_a_multiple_of_32_where_there_is_room(monkeypatch):
    monkeypatch.setattr(tiles, "_ROWS", 20)
    (view,) = views(AR())
    found = tiled(view).tiles
    assert [tile.keys for tile in found] == [(slice(0, size),) for size in (32, 64, 64, 96, 96)]
    assert tiles._widened(slice(70, 90), 96, 0) == slice(64, 96)
    assert tiles._widened(slice(5, 15), 20, 0) == slice(0, 20)
    assert tiles._widened(slice(1, 32), 96, 1) == slice(1, 32)
    assert tiles._widened(slice(66, 96), 96, 1) == slice(65, 96)


def test_masks_of_a_sequential_term_have_their_own_keys_outside_the_products():
    for variant in ("A", "B"):
        view = views(EsoLM(variant=variant, alpha_0=0.5), padding=20)[1]
        masks = view.tokens.shape[1] - (LENGTH - 1)
        first, *others = tiled(view).tiles
        assert first.own and first.rows == slice(0, masks) and first.keys == (slice(masks, masks + LENGTH - 1),)
        assert not any(tile.own for tile in others)


def test_texts_that_read_alike_share_one_mask():
    (view,) = views(BD3LM(block_size=8))
    assert {len(added) for tile in tiled(view).tiles for _, added in tile.masks} == {1}
