"""Attention in tiles, for training on a CPU: only the keys that somebody reads, and never all scores at once.

    tile          rows that are read from together, with the spans of keys that one of them reads in one of the texts
    forward       p = softmax(q k^T), out = p v              a few texts of a tile at a time
    backward      ds = p (dp - sum(p dp)), dp = dout v^T     p is kept where it is small, else computed again

    keys  0 1 2 3 4     a tile of the rows 0, 1: it computes scores of the keys 0, 1 and 3, 4 and skips 2;
    row 0 # . . # .     0 and 3 are read by all its rows, so they need no mask
    row 1 # # . # #

Rows that read none of each other's keys (masks of a sequential term) have their own keys outside the products: a dot
product for each row in place of a square of scores.

torch's fused kernel is given a mask and computes what the mask hides; in bf16 it takes twice the time of plain products
on top of that. Spans are widened a little where the sizes are faster. This knows masks and no rule.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 128  # of a tile, about: fewer rows skip more keys, but make products too small to be fast
_KEYS = 32  # the keys of a tile are a multiple of this where there is room: softmax of 127 takes twice that of 128
_SCORES_AT_ONCE = 2**20  # of some texts of a tile: they fit a core's share of the cache
_SCORES_KEPT = 2**24  # of a layer, for the backward pass: 32 MiB in bf16


@dataclass(frozen=True)
class Tile:
    """Rows, the spans of keys that they read, and the pieces of these keys (counted within the tile) that only some of
    them read, each with what to add to its scores: nothing where a row reads, else minus infinity. `own`: each row
    reads its own key but that of no other row here, and it stands before the spans."""

    rows: slice
    keys: tuple[slice, ...]
    masks: tuple[tuple[slice, Float[Tensor, "text 1 row _"]], ...]
    own: bool

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def num_keys(self) -> int:
        return int(self.own + sum(span.stop - span.start for span in self.keys))


def cut(mask: Bool[Tensor, "text row key"], edges: Sequence[int], dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles of a mask (True where a row reads a key), which may be one for all texts, for scores of this dtype.
    Rows of one tile should read much the same keys, so no tile lies across one of the `edges`."""
    bounds = [0, *edges, mask.shape[1]]
    tiles = []
    for start, stop in itertools.pairwise(bounds):
        pieces = max(1, round((stop - start) / _ROWS))
        places = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        tiles += [_tile(mask, slice(a, b), dtype) for a, b in itertools.pairwise(places) if a < b]
    return tuple(tiles)


def attend(
    q: Float[Tensor, "batch head row dim"],
    k: Float[Tensor, "batch head key dim"],
    v: Float[Tensor, "batch head key dim"],
    tiles: tuple[Tile, ...],
) -> Float[Tensor, "batch head row dim"]:
    """Softmax attention, scaled by 1/sqrt(dim). Rows in none of the tiles get zeros."""
    out: Tensor = _Tiled.apply(q, k, v, tiles)  # type: ignore[no-untyped-call]
    return out


def _tile(mask: Tensor, rows: slice, dtype: torch.dtype) -> Tile:
    part = mask[:, rows]
    read = part.flatten(0, 1).any(0)
    own = _reads_own(part[:, :, rows]) and int(read.sum()) > part.shape[1]
    if own:
        part = part.clone()
        part[:, :, rows] = read[rows] = False
    by_all = part.flatten(0, 1).all(0)
    for run in list(_runs(read)):
        read[_widened(run, len(read), own)] = True
    keys = tuple(_runs(read))
    by_some = ~torch.cat([by_all[span] for span in keys])
    hidden = ~torch.cat([part[:, None, :, span] for span in keys], dim=-1)
    pieces = [(slice(piece.start + own, piece.stop + own), hidden[..., piece]) for piece in _runs(by_some)]
    # added, not filled in: torch adds eight times as fast
    masks = tuple((at, torch.zeros_like(x, dtype=dtype).masked_fill_(x, -torch.inf)) for at, x in pieces)
    return Tile(rows, keys, masks, own)


def _reads_own(square: Bool[Tensor, "text row row"]) -> bool:
    """Does each of these rows read its own key, and none of the others'?"""
    return torch.equal(square, torch.eye(square.shape[1], dtype=torch.bool).expand_as(square))


def _runs(flags: Tensor) -> Iterator[slice]:
    """The stretches of a line of flags that are True."""
    changes = torch.nn.functional.pad(flags.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return (slice(a, b) for a, b in zip(changes[::2], changes[1::2], strict=True))


def _widened(run: slice, most: int, more: int) -> slice:
    """A stretch with so many keys around it that with `more` of them they are a multiple."""
    stop = min(most, run.stop + (run.start - run.stop - more) % _KEYS)
    return slice(max(0, stop - (stop - run.start + more + _KEYS - 1) // _KEYS * _KEYS + more), stop)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
        q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous()
        out = torch.zeros_like(q.transpose(1, 2)).transpose(1, 2)  # a row's heads side by side, as they go on
        scores = len(q) * q.shape[1] * sum(tile.num_rows * tile.num_keys for tile in tiles)
        keep = scores <= _SCORES_KEPT and any(ctx.needs_input_grad)
        kept = []
        for tile, texts in _parts(q, tiles):
            p = _probabilities(q, k, tile, texts)
            out[texts, :, tile.rows] = p @ _read(v[texts], tile)
            if tile.own:
                out[texts, :, tile.rows] += p[..., :1] * v[texts, :, tile.rows]
            if keep:
                kept.append(p)
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        # a key is read from several tiles: summed in float32
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k).float(), torch.zeros_like(v).float()
        for part, (tile, texts) in enumerate(_parts(q, ctx.tiles)):
            p = kept[part] if kept else _probabilities(q, k, tile, texts)
            above, queries = grad[texts, :, tile.rows], q[texts, :, tile.rows]
            _add(grad_v[texts], tile, p.mT @ above)
            grad_p = above @ _read(v[texts], tile).mT
            if tile.own:
                grad_v[texts, :, tile.rows] += p[..., :1] * above
                grad_p[..., 0] = (above * v[texts, :, tile.rows]).sum(-1)
            slope = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[texts, :, tile.rows] = slope @ _read(k[texts], tile)
            _add(grad_k[texts], tile, slope.mT @ queries)
            if tile.own:
                grad_q[texts, :, tile.rows] += slope[..., :1] * k[texts, :, tile.rows]
                grad_k[texts, :, tile.rows] += slope[..., :1] * queries
        return grad_q.mul_(q.shape[-1] ** -0.5), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _parts(q: Tensor, tiles: tuple[Tile, ...]) -> Iterator[tuple[Tile, slice]]:
    """Each tile with as many texts at a time as may be in work at once."""
    for tile in tiles:
        texts = max(1, _SCORES_AT_ONCE // (q.shape[1] * tile.num_rows * tile.num_keys))
        yield from ((tile, slice(at, at + texts)) for at in range(0, len(q), texts))


def _probabilities(q: Tensor, k: Tensor, tile: Tile, texts: slice) -> Tensor:
    queries = q[texts, :, tile.rows]
    scores = queries @ _read(k[texts], tile).mT
    if tile.own:
        scores[..., 0] = (queries * k[texts, :, tile.rows]).sum(-1)
    for piece, mask in tile.masks:
        scores[..., piece] += mask if len(mask) == 1 else mask[texts]
    return scores.softmax(-1)


def _read(x: Tensor, tile: Tile) -> Tensor:
    """The keys or values of a tile, zeros in the place of each row's own."""
    parts = [x[:, :, span] for span in tile.keys]
    parts = [torch.zeros_like(x[:, :, :1]), *parts] if tile.own else parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add(total: Tensor, tile: Tile, values: Tensor) -> None:
    at = int(tile.own)
    for span in tile.keys:
        size = span.stop - span.start
        total[:, :, span] += values[:, :, at : at + size]
        at += size
