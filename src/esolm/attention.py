"""Who reads whom: one rule for every method, its picture, and attention under it with three backends.

    attends(q, k) = (k.public and k.stage < q.stage) or (k.stage == q.stage and k.public == q.public)

Every row of the network's input has a stage (when it is written) and is public if later stages may read it. A padding
row is private and of stage `PADDING`, so that no other row reads it. It projects nothing and caches nothing.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from esolm.tiles import Tile, attend, cut

PADDING = 2**40  # later than any stage, so that `k.stage < q.stage` never holds for a padding key
_FLEX_ROWS = 128  # FlexAttention works in blocks of 128 rows; below that a dense mask is cheaper
_TILED_ROWS = 64  # tiles of fewer rows than this have nothing to skip


def attends(
    q_stage: Int64[Tensor, "batch row"],
    q_public: Bool[Tensor, "batch row"],
    k_stage: Int64[Tensor, "batch key"],
    k_public: Bool[Tensor, "batch key"],
) -> Bool[Tensor, "batch row key"]:
    """The rule, as a mask: True where row `q` reads row `k`."""
    mask: Tensor = rule(q_stage[:, :, None], q_public[:, :, None], k_stage[:, None, :], k_public[:, None, :])
    return mask


def rule(q_stage: Any, q_public: Any, k_stage: Any, k_public: Any) -> Any:
    """The rule for each pair of rows, of tensors or of arrays whose shapes broadcast."""
    return (k_public & (k_stage < q_stage)) | ((k_stage == q_stage) & (k_public == q_public))


def picture(stage: Int64[Tensor, "row"], public: Bool[Tensor, "row"]) -> str:
    """The rule drawn: a line for each reading row, `#` where it reads and `.` where it does not."""
    mask = attends(stage[None], public[None], stage[None], public[None])[0]
    return "\n".join("".join("#" if reads else "." for reads in line) for line in mask.tolist())


@dataclass(frozen=True)
class Relation:
    """Who reads whom in one pass, in the form that a backend takes: everybody, causal, a mask, a block mask, tiles."""

    causal: bool = False
    mask: Bool[Tensor, "batch 1 row key"] | None = None
    blocks: Any = None
    tiles: tuple[Tile, ...] | None = None

    def reading(self, wanted: Bool[Tensor, "row"]) -> "Relation":
        """The same, with leave to skip what only unwanted rows read."""
        if self.tiles is None:
            return self
        return Relation(tiles=tuple(tile for tile in self.tiles if bool(wanted[tile.rows].any())))


def relation(stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"]) -> Relation:
    """The relation of rows among themselves, with the cheapest backend that can hold it."""
    rows = stage.shape[1]
    if bool(((stage == stage[:, :1]) & (public == public[:, :1])).all()):
        return Relation()
    if bool((public & (stage == torch.arange(rows, device=stage.device))).all()):
        return Relation(causal=True)
    if stage.is_cuda and rows >= _FLEX_ROWS:
        return Relation(blocks=block_mask(stage, public))
    return Relation(mask=attends(stage, public, stage, public)[:, None])


def relation_in_tiles(
    stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"], dtype: torch.dtype
) -> Relation:
    """The relation of rows among themselves for a pass of training or scoring with scores of this dtype: on a CPU, in
    tiles."""
    if stage.device.type != "cpu" or stage.shape[1] < _TILED_ROWS:
        return relation(stage, public)
    # a padding row reads itself alone
    stage = stage.where(stage != PADDING, stage + torch.arange(stage.shape[1]))
    if bool((stage == stage[:1]).all()) and bool((public == public[:1]).all()):
        stage, public = stage[:1], public[:1]  # one mask for all texts
    halves = (public[0, 1:] != public[0, :-1]).nonzero()[:, 0] + 1
    return Relation(tiles=cut(attends(stage, public, stage, public), halves.tolist(), dtype))


def block_mask(stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"]) -> Any:
    """The same relation as a block mask of FlexAttention, which skips blocks where nobody reads."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, rows = stage.shape
    # a lambda, not a function: torch counts its parameters, which the shape checks of the tests would hide
    return create_block_mask(
        lambda b, h, q, k: rule(stage[b, q], public[b, q], stage[b, k], public[b, k]),
        batch,
        None,
        rows,
        rows,
        device=str(stage.device),
    )


def attention(
    q: Float[Tensor, "batch head row dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key dim"],
    who: Relation,
) -> Float[Tensor, "batch head row dim"]:
    """Softmax attention, scaled by 1/sqrt(dim), under a relation. Fewer key heads than heads are shared in groups."""
    grouped = k.shape[1] != q.shape[1]
    if who.blocks is not None:
        out: Tensor = _flex(q.is_cuda)(q, k, v, block_mask=who.blocks, enable_gqa=grouped)
        return out
    if who.tiles is not None:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)) if grouped else (k, v)
        return attend(q, k, v, who.tiles)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=who.mask, is_causal=who.causal, enable_gqa=grouped)


@cache
def _flex(compiled: bool) -> Any:
    """FlexAttention, compiled where that makes a fused kernel (CUDA)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
