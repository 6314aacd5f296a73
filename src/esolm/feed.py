"""What the steps of some texts feed to the network, found for many of them at once: it follows from their plans alone.

    rows of a step, in rank order:   [tokens that enter the cache][tokens only read][masks]

It holds no tokens and runs no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esolm.algorithms.algorithm import Plan
from esolm.attention import PADDING, Relation, relation, rule
from esolm.cache import Cache
from esolm.engine import Engine
from esolm.inference import Network
from esolm.passes import Passes

NOWHERE = np.iinfo(np.int64).max
_STEPS_AT_ONCE, _READ_AT_ONCE = 256, 2**22  # steps, and entries of their masks, that are found together


@dataclass(slots=True)
class Rows:
    """What one step feeds, as a network of torch takes it."""

    count: int  # rows of each text
    positions: torch.Tensor
    who: Relation
    caches: bool  # does any text keep rows?
    drawn: torch.Tensor  # rows to draw, counted through the texts


class Feed:
    """What the next steps of the unfinished texts feed, `first` up to `last`: step by step it would take longer than a
    small network. `passes`: the same, laid out for the compiled network, where it is that.

    The row of rank `r` has slot `r` of the cache, so the rows that are read are known too, the kept ones included.
    """

    def __init__(self, plans: "Tables", texts: np.ndarray, first: int, network: Network, cache: Cache | None) -> None:
        self.first = first
        self.last = self._count_steps(plans, texts)
        kept, closed, start, stop, shown = (table[texts, first : self.last].T[:, :, None] for table in plans.boundaries)
        self._counts = np.ascontiguousarray((shown - kept)[:, :, 0])
        self._count = self._counts.max(1).tolist()
        self._used = (kept.max((1, 2)) + self._count).tolist()
        self._caches: list[bool] = (closed.max((1, 2)) > 0).tolist()
        rank = kept + np.arange(max(self._count))  # [step, text, row]
        drawn: np.ndarray = (rank >= start) & (rank < stop)
        text, self._rank = texts[:, None], np.minimum(rank, plans.order.shape[1] - 1)
        real = rank < shown
        self._stage, self._public = plans.rows(text, self._rank, start, closed)
        self._stage[~real] = PADDING
        self._public &= real
        positions = plans.order[text, self._rank]
        self._positions = torch.from_numpy(positions).to(network.device)
        if any(self._caches) or isinstance(network, Engine):
            slot = np.arange(max(self._used))[None, None]
            holds = plans.rows(text, np.minimum(slot, plans.order.shape[1] - 1), start, closed)
            self._mask = self._who_reads(*holds, slot < shown, real)
        step, self._drawn_text, self._drawn_row = drawn.nonzero()
        self._drawn_at = np.searchsorted(step, np.arange(self.last - first + 1)).tolist()
        self._drawn_rank = self._rank[drawn]
        flat = self._drawn_text * np.array(self._count)[step] + self._drawn_row
        self._flat = torch.from_numpy(flat).to(network.device)
        # where a row's token stands in a table [text, rank] that has the mask behind its last rank: so before its first
        self._holds = text * (plans.order.shape[1] + 1) + self._rank - plans.shifted
        self.passes: Passes | None = None
        if isinstance(network, Engine):
            self.passes = network.passes(
                cache or network.cache(len(texts), max(self._used)),
                positions=positions,
                real=real,
                wanted=drawn,
                mask=self._mask,
                kept=kept[:, :, 0],
            )

    def tokens(self, step: int, table: np.ndarray) -> np.ndarray:
        """Of the rows that a step feeds, `[text, row]`, from a table of tokens `[text, rank]` with a last column of
        masks."""
        found: np.ndarray = table.take(self._holds[step - self.first])
        return found

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Text and rank of each row that a step draws."""
        part = slice(self._drawn_at[step - self.first], self._drawn_at[step - self.first + 1])
        return self._drawn_text[part], self._drawn_rank[part]

    def rows(self, step: int) -> Rows:
        """What a step feeds to a network of torch."""
        at = step - self.first
        return Rows(
            count=self._count[at],
            positions=self._positions[at, :, : self._count[at]],
            who=self._who(at),
            caches=self._caches[at],
            drawn=self._flat[self._drawn_at[at] : self._drawn_at[at + 1]],
        )

    def _who(self, at: int) -> Relation:
        count, device = self._count[at], self._positions.device
        if not self._caches[at]:
            rows = self._stage[at, :, :count], self._public[at, :, :count]
            return relation(*(torch.from_numpy(each).to(device) for each in rows))
        mask = self._mask[at, :, :count, : self._used[at]]
        if device.type == "cpu" and mask.all():
            return Relation()
        return Relation(mask=torch.from_numpy(mask[:, None]).to(device))

    def _count_steps(self, plans: "Tables", texts: np.ndarray) -> int:
        """The last step such that the masks of all of them stay small."""
        last = min(self.first + _STEPS_AT_ONCE, int(plans.num_steps[texts].min()))
        kept, shown = plans.kept[texts, self.first : last].max(0), plans.shown[texts, self.first : last].max(0)
        count = (plans.shown - plans.kept)[texts, self.first : last].max(0)
        each = np.maximum.accumulate(count) * np.maximum.accumulate(np.maximum(kept + count, shown)) * len(texts)
        return self.first + max(1, int((each * np.arange(1, len(each) + 1) <= _READ_AT_ONCE).sum()))

    def _who_reads(self, stage: np.ndarray, public: np.ndarray, filled: np.ndarray, real: np.ndarray) -> np.ndarray:
        """`[step, text, row, slot]`. Rows that fill the pass read everything: to read nothing would be NaN."""
        mask: np.ndarray = rule(self._stage[..., None], self._public[..., None], stage[:, :, None], public[:, :, None])
        mask &= filled[:, :, None]
        mask |= ~real[..., None]
        return mask


class Tables:
    """The plans of a batch as arrays `[text, rank]` and `[text, step]`, padded to the longest."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.num_steps = np.array([plan.num_steps for plan in plans])
        self.order = _stacked([plan.order for plan in plans])
        self.token_stage = _stacked([plan.token_stage for plan in plans])
        self.mask_stage = _stacked([plan.mask_stage for plan in plans])
        names = ("closed", "start", "stop", "shown")
        tables = [_stacked([getattr(plan, name) for plan in plans]) for name in names]
        self.kept = np.concatenate((np.zeros_like(tables[0][:, :1]), tables[0][:, :-1]), axis=1)
        self.closed, self.start, self.stop, self.shown = tables
        self.boundaries = (self.kept, *tables)
        self.sequential = _stacked([plan.sequential for plan in plans])
        self.masks_public, self.shifted = plans[0].masks_public, plans[0].shifted
        # the smallest position not written when ranks up to `r` are: a minimum over the ranks from `r` on
        unwritten = np.concatenate((self.order, np.full((len(plans), 1), NOWHERE)), axis=1)
        for text, plan in enumerate(plans):
            unwritten[text, len(plan.order) :] = NOWHERE
        self.first_unwritten = np.minimum.accumulate(unwritten[:, ::-1], axis=1)[:, ::-1]
        self.capacity = self._capacity()

    def rows(
        self, text: np.ndarray, rank: np.ndarray, start: np.ndarray, closed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stage of the rows at these ranks, and whether they are public, in steps with these boundaries."""
        stage = np.where(rank < start, self.token_stage[text, rank], self.mask_stage[text, rank])
        public = np.broadcast_to((rank < closed) | self.masks_public, stage.shape)
        return stage, public.copy()

    def _capacity(self) -> int:
        """Cache rows that the batch needs at its fullest step: what is kept in any text, and the rows of any text."""
        if not self.closed.any():
            return 0
        running = np.arange(self.closed.shape[1]) < self.num_steps[:, None]
        rows = np.where(running, self.shown - self.kept, 0).max(0)
        return int((np.where(running, self.kept, 0).max(0) + rows).max())


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    table = np.zeros((len(arrays), max(len(array) for array in arrays)), dtype=arrays[0].dtype)
    for row, array in zip(table, arrays, strict=True):
        row[: len(array)] = array
    return table
