"""One sampler for every plan: feed the rows of a step, draw the tokens it writes, keep what is public.

    rows of a step, in rank order:   [tokens that enter the cache][tokens only read][masks]
    logits of the masks to draw  ->  tokens  ->  the next step

Each text has its own plan and its own random numbers, so it does not depend on what else is in the batch. Rows of many
texts go through the network together, padded to the longest. It loads no model and prints nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esolm.algorithms.algorithm import Algorithm, Phase, Plan, Request
from esolm.attention import PADDING, Relation, attends, relation
from esolm.draw import draw, draw_rows
from esolm.engine import Engine
from esolm.inference import Network
from esolm.noise import generator, uniforms

_PLAN, _TOKENS = 0, 1  # purposes of a request's random numbers
_DRAWN_AT_ONCE = 2**20  # logits held at a time: 4 MiB in float32
_STEPS_AT_ONCE, _READ_AT_ONCE = 256, 2**22  # steps, and entries of their masks, that are found together
_NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """Tokens that one step wrote in one text of the batch."""

    text: int
    step: int
    phase: Phase
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A written text: tokens in reading order (up to and without its end-of-text token) and what it cost."""

    tokens: np.ndarray
    nfe: int


def write(
    denoiser: Network, algorithm: Algorithm, requests: Sequence[Request], *, end_id: int | None = None
) -> Iterator[Reveal]:
    """Write texts, yielding each step's tokens as they come."""
    writer = Writer(denoiser, algorithm, requests, end_id=end_id)
    while writer.active:
        yield from writer.step()


def complete(
    denoiser: Network, algorithm: Algorithm, requests: Sequence[Request], *, end_id: int | None = None
) -> list[Written]:
    """Write texts to their ends."""
    writer = Writer(denoiser, algorithm, requests, end_id=end_id)
    while writer.active:
        writer.advance()
    return writer.texts()


class Writer:
    """Texts being written: their tokens by rank, their plans as tables over steps, and the cache.

    `advance` is one step of all texts. `evaluate` and `accept` are its halves: logits of the rows to draw, and the
    tokens decided for them (which need not be drawn from those logits: teacher forcing, verification of drafts).
    """

    def __init__(
        self,
        denoiser: Network,
        algorithm: Algorithm,
        requests: Sequence[Request],
        *,
        end_id: int | None = None,
    ) -> None:
        config = denoiser.config
        _check(denoiser, algorithm, requests)
        self.denoiser = denoiser
        self.requests = list(requests)
        self.nfe = np.zeros(len(requests), dtype=np.int64)
        self._end_id = end_id
        plans = [algorithm.plan(request, generator(request.seed, _PLAN)) for request in requests]
        self._plans = _Tables(plans)
        # one column more than ranks, and the mask in it: what stands before rank 0 is the mask
        self._tokens = np.full((len(plans), self._plans.order.shape[1] + 1), config.mask_id)
        for text, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            known = np.array([request.given.get(int(place), config.mask_id) for place in plan.order])
            self._tokens[text, : len(known)] = known
        self._uniform = np.stack([uniforms(self._tokens.shape[1], r.seed, _TOKENS) for r in requests])
        self._same_draw = len({request.draw for request in requests}) == 1
        self._first_free = np.array([request.free[0] if len(request.free) else 0 for request in requests])
        self._stops = np.array([request.stop_at_end for request in requests]) & (end_id is not None)
        self._first_end, self._ending = np.full(len(requests), _NOWHERE), False
        if end_id is not None:
            self._find_ends(*(self._tokens[:, :-1] == end_id).nonzero())
        self._step = 0
        self._cache = denoiser.cache(len(requests), self._plans.capacity) if self._plans.capacity else None
        self._texts = np.arange(len(requests))
        self._feed: _Feed | None = None
        self._drop_finished()

    @property
    def active(self) -> bool:
        """Is any text unfinished?"""
        return len(self._texts) > 0

    @torch.inference_mode()
    def advance(self) -> None:
        """One step of every unfinished text: one evaluation of the network, and the tokens it decides."""
        hidden, text, rank = self.evaluate()
        drawn = np.empty(len(rank), dtype=np.int64)
        at_once = max(1, _DRAWN_AT_ONCE // self.denoiser.config.vocab_size)
        for at in range(0, len(rank), at_once):
            part = slice(at, at + at_once)
            drawn[part] = self._draw(hidden[part], self._texts[text[part]], rank[part])
        self.accept(text, rank, drawn)

    def step(self) -> list[Reveal]:
        """`advance`, and what it revealed in each text."""
        texts, step, plans = self._texts, self._step, self._plans
        self.advance()
        reveals = []
        for text in texts.tolist():
            ranks = slice(plans.start[text, step], plans.stop[text, step])
            reveals.append(
                Reveal(
                    text=text,
                    step=step,
                    phase="sequential" if plans.sequential[text, step] else "diffusion",
                    positions=tuple(plans.order[text, ranks].tolist()),
                    tokens=tuple(self._tokens[text, ranks].tolist()),
                )
            )
        return reveals

    @torch.inference_mode()
    def evaluate(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Feed this step's rows. Returns hidden states `[drawn, width]` of the rows to draw, and each one's text (its
        place among the unfinished) and rank."""
        rows = self._look_ahead().rows(self._step)
        held = self._tokens[self._texts[:, None], rows.rank - self._plans.shifted]
        tokens = torch.from_numpy(held).to(self.denoiser.device)
        kept = self._cache if rows.caches else None
        if kept is not None:
            kept.place(held.shape[1])
        hidden: torch.Tensor = self.denoiser(tokens, rows.positions, rows.who, kept)
        # not by an index in brackets: that wakes torch's threads, and they would keep a core from the engine's
        drawn = hidden.flatten(0, 1).index_select(0, rows.drawn)
        return drawn, rows.drawn_text, rows.drawn_rank

    def accept(self, text: np.ndarray, rank: np.ndarray, tokens: np.ndarray) -> None:
        """Take `tokens` for the rows that `evaluate` returned, and go on to the next step."""
        at = self._texts
        self._tokens[at[text], rank] = tokens
        self.nfe[at] += 1
        if self._cache is not None:
            self._cache.truncate(self._plans.closed[at, self._step])
        self._step += 1
        ends = () if self._end_id is None else (tokens == self._end_id).nonzero()[0]
        if len(ends):
            self._find_ends(at[text[ends]], rank[ends])
        if self._ending or self._step == self._next_done:
            self._drop_finished()

    def places(self, text: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows that `evaluate` returned: the request that each belongs to, and its position in that text."""
        which = self._texts[text]
        return which, self._plans.order[which, rank]

    def texts(self) -> list[Written]:
        """The texts as they stand, in the order of the requests: masks where nothing is written yet."""
        return [self._text(text) for text in range(len(self.requests))]

    def _look_ahead(self) -> "_Feed":
        """What the next steps feed; found again where it is known no further."""
        if self._feed is None or self._step == self._feed.last:
            self._feed = _Feed(self._plans, self._texts, self._step, self.denoiser.device)
        return self._feed

    def _draw(self, hidden: torch.Tensor, text: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Tokens of rows with these hidden states, by the options and the random numbers of their texts."""
        options = self.requests[0].draw
        if isinstance(self.denoiser, Engine) and self._same_draw and options.plain:
            return self.denoiser.draw(hidden, self._uniform[text, rank], options.temperature)
        logits = self.denoiser.logits(hidden).float()
        logits[:, -1] = -torch.inf
        if logits.device.type == "mps":  # it has no float64, which exact draws need
            logits = logits.cpu()
        uniform = torch.from_numpy(self._uniform[text, rank]).to(logits.device)
        if self._same_draw:
            tokens = draw(logits, uniform, options)
        else:
            tokens = draw_rows(logits, uniform, [self.requests[row].draw for row in text])
        return tokens.cpu().numpy()

    def _find_ends(self, text: np.ndarray, rank: np.ndarray) -> None:
        """Note where these end-of-text tokens stand, if they end their texts."""
        position = self._plans.order[text, rank]
        ending = position >= self._first_free[text]
        np.minimum.at(self._first_end, text[ending], position[ending])
        self._ending = self._ending or bool(ending.any())

    def _drop_finished(self) -> None:
        """Leave texts whose plan is done, or that are written up to their first end-of-text token."""
        at, plans = self._texts, self._plans
        unfinished = self._step < plans.num_steps[at]
        if unfinished.any():
            written = plans.start[at, min(self._step, plans.start.shape[1] - 1)]
            unfinished &= ~self._stops[at] | (self._first_end[at] >= plans.first_unwritten[at, written])
        self._next_done = int(plans.num_steps[at[unfinished]].min(initial=_NOWHERE))
        if unfinished.all():
            return
        kept = unfinished.nonzero()[0]
        self._texts, self._feed = at[kept], None
        if self._cache is not None and len(kept):
            self._cache.select(kept)

    def _text(self, text: int) -> Written:
        length = self.requests[text].length
        order, tokens = self._plans.order[text, :length], np.empty(length, dtype=np.int64)
        tokens[order] = self._tokens[text, :length]
        if self._stops[text]:
            tokens = tokens[: self._first_end[text]]
        return Written(tokens=tokens, nfe=int(self.nfe[text]))


@dataclass(slots=True)
class _Rows:
    """What one step feeds: rows of each unfinished text, in rank order, and which of them are drawn."""

    rank: np.ndarray  # [text, row]
    positions: torch.Tensor
    who: Relation
    caches: bool  # does any text keep rows?
    drawn: torch.Tensor  # rows to draw, counted through the texts
    drawn_text: np.ndarray
    drawn_rank: np.ndarray


class _Feed:
    """What the next steps of the unfinished texts feed, `first` up to `last`. It follows from the plans alone, so it is
    found for many steps at once: step by step it would take longer than a small network.

    The row of rank `r` has slot `r` of the cache, so the rows that are read are known too, the kept ones included.
    """

    def __init__(self, plans: "_Tables", texts: np.ndarray, first: int, device: torch.device) -> None:
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
        real = torch.from_numpy(rank < shown)
        self._stage, self._public = plans.rows(text, self._rank, start, closed)
        self._stage.masked_fill_(~real, PADDING)
        self._public &= real
        self._positions = torch.from_numpy(plans.order[text, self._rank]).to(device)
        if any(self._caches):
            slot = np.arange(max(self._used))[None, None]
            holds = plans.rows(text, np.minimum(slot, plans.order.shape[1] - 1), start, closed)
            self._mask = self._who_reads(*holds, slot < shown, real).to(device)
        step, self._drawn_text, self._drawn_row = drawn.nonzero()
        self._drawn_at = np.searchsorted(step, np.arange(self.last - first + 1)).tolist()
        self._flat = torch.from_numpy(self._drawn_text * np.array(self._count)[step] + self._drawn_row).to(device)

    def rows(self, step: int) -> _Rows:
        """What a step feeds."""
        at = step - self.first
        count, drawn = self._count[at], slice(self._drawn_at[at], self._drawn_at[at + 1])
        text, row = self._drawn_text[drawn], self._drawn_row[drawn]
        return _Rows(
            rank=self._rank[at, :, :count],
            positions=self._positions[at, :, :count],
            who=self._who(at),
            caches=self._caches[at],
            drawn=self._flat[drawn],
            drawn_text=text,
            drawn_rank=self._rank[at, text, row],
        )

    def _who(self, at: int) -> Relation:
        count, counts = self._count[at], self._counts[at]
        if not self._caches[at]:
            device = self._positions.device
            return relation(self._stage[at, :, :count].to(device), self._public[at, :, :count].to(device))
        mask = self._mask[at, :, :count, : self._used[at]]
        if not mask.is_cuda and bool(mask.all()):
            return Relation()
        return Relation(mask=mask[:, None], counts=counts if counts.min() < count else None)

    def _count_steps(self, plans: "_Tables", texts: np.ndarray) -> int:
        """The last step such that the masks of all of them stay small."""
        last = min(self.first + _STEPS_AT_ONCE, int(plans.num_steps[texts].min()))
        kept, shown = plans.kept[texts, self.first : last].max(0), plans.shown[texts, self.first : last].max(0)
        count = (plans.shown - plans.kept)[texts, self.first : last].max(0)
        each = np.maximum.accumulate(count) * np.maximum.accumulate(np.maximum(kept + count, shown)) * len(texts)
        return self.first + max(1, int((each * np.arange(1, len(each) + 1) <= _READ_AT_ONCE).sum()))

    def _who_reads(
        self, stage: torch.Tensor, public: torch.Tensor, filled: np.ndarray, real: torch.Tensor
    ) -> torch.Tensor:
        """`[step, text, row, slot]`. Rows that fill the pass read everything: to read nothing would be NaN."""
        mask = attends(*(rows.flatten(0, 1) for rows in (self._stage, self._public, stage, public)))
        mask &= torch.from_numpy(filled).flatten(0, 1)[:, None]
        mask |= ~real.flatten(0, 1)[:, :, None]
        return mask.view(*real.shape, -1)


class _Tables:
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
        unwritten = np.concatenate((self.order, np.full((len(plans), 1), _NOWHERE)), axis=1)
        for text, plan in enumerate(plans):
            unwritten[text, len(plan.order) :] = _NOWHERE
        self.first_unwritten = np.minimum.accumulate(unwritten[:, ::-1], axis=1)[:, ::-1]
        self.capacity = self._capacity()

    def rows(
        self, text: np.ndarray, rank: np.ndarray, start: np.ndarray, closed: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage of the rows at these ranks, and whether they are public, in steps with these boundaries."""
        stage = np.where(rank < start, self.token_stage[text, rank], self.mask_stage[text, rank])
        public = np.broadcast_to((rank < closed) | self.masks_public, stage.shape)
        return torch.from_numpy(stage), torch.from_numpy(public.copy())

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


def _check(denoiser: Network, algorithm: Algorithm, requests: Sequence[Request]) -> None:
    config = denoiser.config
    if not requests:
        raise ValueError("there is nothing to write: give at least one request")
    for request in requests:
        if request.length > config.length:
            raise ValueError(
                f"a text of {request.length} tokens is longer than the model's {config.length}: "
                "shorten it or its prompt"
            )
        for position, token in request.given.items():
            if not 0 <= token < config.mask_id:
                raise ValueError(
                    f"given token {token} at position {position} is not in the vocabulary: "
                    f"ids lie in [0, {config.mask_id})"
                )
