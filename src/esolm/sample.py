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
from esolm.attention import PADDING, relation
from esolm.denoiser import Denoiser
from esolm.draw import draw, draw_rows
from esolm.noise import generator, uniforms

_PLAN, _TOKENS = 0, 1  # purposes of a request's random numbers
_DRAWN_AT_ONCE = 2**24  # logits held at a time: 64 MiB in float32


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
    denoiser: Denoiser, algorithm: Algorithm, requests: Sequence[Request], *, end_id: int | None = None
) -> Iterator[Reveal]:
    """Write texts, yielding each step's tokens as they come."""
    writer = Writer(denoiser, algorithm, requests, end_id=end_id)
    while writer.active:
        yield from writer.step()


def complete(
    denoiser: Denoiser, algorithm: Algorithm, requests: Sequence[Request], *, end_id: int | None = None
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
        denoiser: Denoiser,
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
        self._tokens = np.full_like(self._plans.order, config.mask_id)
        for text, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            known = np.array([request.given.get(int(place), config.mask_id) for place in plan.order])
            self._tokens[text, : len(known)] = known
        self._uniform = np.stack([uniforms(self._tokens.shape[1], r.seed, _TOKENS) for r in requests])
        self._first_free = np.array([request.free[0] if len(request.free) else 0 for request in requests])
        self._stops = np.array([request.stop_at_end for request in requests]) & (end_id is not None)
        self._same_draw = len({request.draw for request in requests}) == 1
        self._step = 0
        self._cached = np.zeros(len(requests), dtype=np.int64)
        self._cache = denoiser.cache(len(requests), self._plans.capacity) if self._plans.capacity else None
        self._texts = np.arange(len(requests))
        self._drop_finished()

    @property
    def active(self) -> bool:
        """Is any text unfinished?"""
        return len(self._texts) > 0

    @torch.inference_mode()
    def advance(self) -> None:
        """One step of every unfinished text: one evaluation of the network, and the tokens it decides."""
        hidden, text, rank = self.evaluate()
        at_once = max(1, _DRAWN_AT_ONCE // self.denoiser.config.vocab_size)
        parts = [slice(at, at + at_once) for at in range(0, len(rank), at_once)]
        drawn = [self._draw(hidden[part], self._texts[text[part]], rank[part]) for part in parts]
        self.accept(text, rank, np.concatenate(drawn))

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
        plans, at, step = self._plans, self._texts, self._step
        closed, start, stop, shown = plans.boundaries[:, at, step]
        count = shown - self._cached
        rank = self._cached[:, None] + np.arange(count.max())
        real = rank < shown[:, None]
        rank = np.minimum(rank, plans.order.shape[1] - 1)
        text = at[:, None]
        held = self._tokens[text, rank - plans.shifted]
        if plans.shifted:  # the first row has no token before it: it holds the mask
            held = np.where(rank == 0, self.denoiser.config.mask_id, held)
        stage = np.where(rank < start[:, None], plans.token_stage[text, rank], plans.mask_stage[text, rank])
        stage = np.where(real, stage, PADDING)
        public = real & ((rank < closed[:, None]) | plans.masks_public)
        hidden = self._forward(held, plans.order[text, rank], stage, public, closed)
        drawn = (rank >= start[:, None]) & (rank < stop[:, None]) & real
        row, column = drawn.nonzero()
        index = torch.from_numpy(row * rank.shape[1] + column).to(hidden.device)
        return hidden.flatten(0, 1)[index], row, rank[row, column]

    def accept(self, text: np.ndarray, rank: np.ndarray, tokens: np.ndarray) -> None:
        """Take `tokens` for the rows that `evaluate` returned, and go on to the next step."""
        at, plans = self._texts, self._plans
        self._tokens[at[text], rank] = tokens
        self.nfe[at] += 1
        if self._cache is not None:
            closed = plans.closed[at, self._step]
            self._cache.commit(closed - self._cached)
            self._cached = closed
        self._step += 1
        self._drop_finished()

    def texts(self) -> list[Written]:
        """The texts as they stand, in the order of the requests: masks where nothing is written yet."""
        return [self._text(text) for text in range(len(self.requests))]

    def _draw(self, hidden: torch.Tensor, text: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Tokens of rows with these hidden states, by the options and the random numbers of their texts."""
        logits = self.denoiser.logits(hidden).float()
        logits[:, -1] = -torch.inf
        uniform = torch.from_numpy(self._uniform[text, rank]).to(logits.device)
        if self._same_draw:
            tokens = draw(logits, uniform, self.requests[0].draw)
        else:
            tokens = draw_rows(logits, uniform, [self.requests[row].draw for row in text])
        return tokens.cpu().numpy()

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        stage: np.ndarray,
        public: np.ndarray,
        closed: np.ndarray,
    ) -> torch.Tensor:
        device = self.denoiser.embed.weight.device
        rows = [torch.from_numpy(array).to(device) for array in (tokens, positions, stage, public)]
        kept = self._cache if closed.any() else None
        who = relation(rows[2], rows[3]) if kept is None else kept.place(rows[2], rows[3])
        hidden: torch.Tensor = self.denoiser(rows[0], rows[1], who, kept)
        return hidden

    def _drop_finished(self) -> None:
        """Leave texts whose plan is done, or that are written up to their first end-of-text token."""
        at, plans = self._texts, self._plans
        unfinished = self._step < plans.num_steps[at]
        stopping = unfinished & self._stops[at]
        if stopping.any():
            written = plans.start[at, np.minimum(self._step, plans.start.shape[1] - 1)]
            ends = (self._tokens[at] == self._end_id) & (plans.order[at] >= self._first_free[at, None])
            first_end = np.where(ends, plans.order[at], np.iinfo(np.int64).max).min(1)
            unfinished &= ~(stopping & (first_end < plans.first_unwritten[at, written]))
        if unfinished.all():
            return
        kept = unfinished.nonzero()[0]
        self._texts, self._cached = at[kept], self._cached[kept]
        if self._cache is not None and len(kept):
            self._cache.select(kept)

    def _text(self, text: int) -> Written:
        length = self.requests[text].length
        order, tokens = self._plans.order[text, :length], np.empty(length, dtype=np.int64)
        tokens[order] = self._tokens[text, :length]
        if self._stops[text]:
            ends = (tokens == self._end_id) & (np.arange(length) >= self._first_free[text])
            tokens = tokens[: ends.argmax()] if ends.any() else tokens
        return Written(tokens=tokens, nfe=int(self.nfe[text]))


class _Tables:
    """The plans of a batch as arrays `[text, rank]` and `[text, step]`, padded to the longest."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.num_steps = np.array([plan.num_steps for plan in plans])
        self.order = _stacked([plan.order for plan in plans])
        self.token_stage = _stacked([plan.token_stage for plan in plans])
        self.mask_stage = _stacked([plan.mask_stage for plan in plans])
        names = ("closed", "start", "stop", "shown")
        self.boundaries = np.stack([_stacked([getattr(plan, name) for plan in plans]) for name in names])
        self.closed, self.start, self.stop, self.shown = self.boundaries
        self.sequential = _stacked([plan.sequential for plan in plans])
        self.masks_public, self.shifted = plans[0].masks_public, plans[0].shifted
        # the smallest position not written when ranks up to `r` are: a minimum over the ranks from `r` on
        unwritten = np.concatenate((self.order, np.full((len(plans), 1), np.iinfo(np.int64).max)), axis=1)
        for text, plan in enumerate(plans):
            unwritten[text, len(plan.order) :] = np.iinfo(np.int64).max
        self.first_unwritten = np.minimum.accumulate(unwritten[:, ::-1], axis=1)[:, ::-1]
        self.capacity = self._capacity()

    def _capacity(self) -> int:
        """Cache rows that the batch needs at its fullest step: what is kept in any text, and the rows of any text."""
        if not self.closed.any():
            return 0
        kept = np.concatenate((np.zeros_like(self.closed[:, :1]), self.closed[:, :-1]), axis=1)
        running = np.arange(self.closed.shape[1]) < self.num_steps[:, None]
        rows = np.where(running, self.shown - kept, 0).max(0)
        return int((np.where(running, kept, 0).max(0) + rows).max())


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    table = np.zeros((len(arrays), max(len(array) for array in arrays)), dtype=arrays[0].dtype)
    for row, array in zip(table, arrays, strict=True):
        row[: len(array)] = array
    return table


def _check(denoiser: Denoiser, algorithm: Algorithm, requests: Sequence[Request]) -> None:
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
