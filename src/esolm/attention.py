"""Who reads whom: one rule for every method, its picture, and attention under it with two backends.

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

PADDING = 2**40  # later than any stage, so that `k.stage < q.stage` never holds for a padding key
_SCORES_HELD = 2**23  # a layer's scores kept for the backward pass: 16 MiB in bf16
_FLEX_ROWS = 128  # FlexAttention works in blocks of 128 rows; below that a dense mask is cheaper


def attends(
    q_stage: Int64[Tensor, "batch row"],
    q_public: Bool[Tensor, "batch row"],
    k_stage: Int64[Tensor, "batch key"],
    k_public: Bool[Tensor, "batch key"],
) -> Bool[Tensor, "batch row key"]:
    """The rule, as a mask: True where row `q` reads row `k`."""
    return _rule(q_stage[:, :, None], q_public[:, :, None], k_stage[:, None, :], k_public[:, None, :])


def picture(stage: Int64[Tensor, "row"], public: Bool[Tensor, "row"]) -> str:
    """The rule drawn: a line for each reading row, `#` where it reads and `.` where it does not."""
    mask = attends(stage[None], public[None], stage[None], public[None])[0]
    return "\n".join("".join("#" if reads else "." for reads in line) for line in mask.tolist())


@dataclass(frozen=True)
class Relation:
    """Who reads whom in one pass, in the form that a backend takes: everybody, causal, a mask, a block mask."""

    causal: bool = False
    mask: Bool[Tensor, "batch 1 row key"] | None = None
    blocks: Any = None


def relation(stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"]) -> Relation:
    """The relation of rows among themselves, with the cheapest backend that can hold it."""
    rows = stage.shape[1]
    if stage.is_cuda and rows >= _FLEX_ROWS:
        return Relation(blocks=block_mask(stage, public))
    if bool((stage == stage[:, :1]).all()) and bool((public == public[:, :1]).all()):
        return Relation()
    if bool(public.all()) and bool((stage == torch.arange(rows, device=stage.device)).all()):
        return Relation(causal=True)
    return Relation(mask=attends(stage, public, stage, public)[:, None])


def block_mask(stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"]) -> Any:
    """The same relation as a block mask of FlexAttention, which skips blocks where nobody reads."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, rows = stage.shape
    # a lambda, not a function: torch counts its parameters, which the shape checks of the tests would hide
    return create_block_mask(
        lambda b, h, q, k: _rule(stage[b, q], public[b, q], stage[b, k], public[b, k]),
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
    if _few_scores(q, k) and not grouped:
        return _by_products(q, k, v, who)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=who.mask, is_causal=who.causal, enable_gqa=grouped)


def _rule(q_stage: Tensor, q_public: Tensor, k_stage: Tensor, k_public: Tensor) -> Tensor:
    return (k_public & (k_stage < q_stage)) | ((k_stage == q_stage) & (k_public == q_public))


def _few_scores(q: Tensor, k: Tensor) -> bool:
    """Is this a bf16 training pass on CPU whose scores may be held? Two plain products then take half the time of the
    fused kernel, forward and backward (docs/log.md); they cost `rows x keys` numbers a head for the backward pass."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and scores <= _SCORES_HELD


def _by_products(q: Tensor, k: Tensor, v: Tensor, who: Relation) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if who.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores + torch.zeros_like(later, dtype=q.dtype).masked_fill_(later, -torch.inf)
    elif who.mask is not None:
        scores = scores + torch.zeros_like(who.mask, dtype=q.dtype).masked_fill_(~who.mask, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out


@cache
def _flex(compiled: bool) -> Any:
    """FlexAttention, compiled where that makes a fused kernel (CUDA)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
