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

from esolm.algorithms.algorithm import Algorithm, Phase, Request
from esolm.draw import draw, draw_rows
from esolm.engine import Engine
from esolm.feed import NOWHERE, Feed, Tables
from esolm.inference import Network
from esolm.noise import generator, uniforms

_PLAN, _TOKENS = 0, 1  # purposes of a request's random numbers
_DRAWN_AT_ONCE = 2**20  # logits held at a time: 4 MiB in float32


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
        self._nfe = np.zeros(len(requests), dtype=np.int64)  # of the texts that are done
        self._end_id = end_id
        plans = [algorithm.plan(request, generator(request.seed, _PLAN)) for request in requests]
        self._plans = Tables(plans)
        # one column more than ranks, and the mask in it: what stands before rank 0 is the mask
        self._tokens = np.full((len(plans), self._plans.order.shape[1] + 1), config.mask_id)
        for text, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            known = np.array([request.given.get(int(place), config.mask_id) for place in plan.order])
            self._tokens[text, : len(known)] = known
        self._uniform = np.stack([uniforms(self._tokens.shape[1], r.seed, _TOKENS) for r in requests])
        self._same_draw = len({request.draw for request in requests}) == 1
        self._first_free = np.array([request.free[0] if len(request.free) else 0 for request in requests])
        self._stops = np.array([request.stop_at_end for request in requests]) & (end_id is not None)
        self._first_end, self._ending = np.full(len(requests), NOWHERE), False
        if end_id is not None:
            self._find_ends(*(self._tokens[:, :-1] == end_id).nonzero())
        self._step = 0
        self._cache = denoiser.cache(len(requests), self._plans.capacity) if self._plans.capacity else None
        self._texts = np.arange(len(requests))
        self._feed: Feed | None = None
        self._drop_finished()

    @property
    def active(self) -> bool:
        """Is any text unfinished?"""
        return len(self._texts) > 0

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

    def evaluate(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Feed this step's rows. Returns hidden states `[drawn, width]` of the rows to draw, and each one's text (its
        place among the unfinished) and rank."""
        feed = self._look_ahead()
        tokens = feed.tokens(self._step, self._tokens)
        passes = feed.passes
        hidden = passes.hidden(self._step - feed.first, tokens) if passes else self._hidden(feed, tokens)
        return hidden, *feed.drawn(self._step)

    def accept(self, text: np.ndarray, rank: np.ndarray, tokens: np.ndarray) -> None:
        """Take `tokens` for the rows that `evaluate` returned, and go on to the next step."""
        at = self._texts
        self._tokens[at[text], rank] = tokens
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

    def _look_ahead(self) -> Feed:
        """What the next steps feed; found again where it is known no further."""
        if self._feed is None or self._step == self._feed.last:
            self._feed = Feed(self._plans, self._texts, self._step, self.denoiser, self._cache)
        return self._feed

    @torch.inference_mode()
    def _hidden(self, feed: Feed, tokens: np.ndarray) -> torch.Tensor:
        """Hidden states of the rows to draw, by a network of torch."""
        rows = feed.rows(self._step)
        tokens_fed = torch.from_numpy(tokens[:, : rows.count]).to(self.denoiser.device)
        kept = self._cache if rows.caches else None
        if kept is not None:
            kept.place(rows.count)
        hidden: torch.Tensor = self.denoiser(tokens_fed, rows.positions, rows.who, kept)
        return hidden.flatten(0, 1).index_select(0, rows.drawn)

    def _draw(self, hidden: torch.Tensor, text: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Tokens of rows with these hidden states, by the options and the random numbers of their texts."""
        options = self.requests[0].draw
        if isinstance(self.denoiser, Engine) and self._same_draw and options.plain:
            return self.denoiser.draw(hidden, self._uniform[text, rank], options.temperature)
        return self._draw_by_torch(hidden, text, rank)

    @torch.inference_mode()
    def _draw_by_torch(self, hidden: torch.Tensor, text: np.ndarray, rank: np.ndarray) -> np.ndarray:
        logits = self.denoiser.logits(hidden).float()
        logits[:, -1] = -torch.inf
        if logits.device.type == "mps":  # it has no float64, which exact draws need
            logits = logits.cpu()
        uniform = torch.from_numpy(self._uniform[text, rank]).to(logits.device)
        if self._same_draw:
            tokens = draw(logits, uniform, self.requests[0].draw)
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
        self._nfe[at] = self._step
        unfinished = self._step < plans.num_steps[at]
        if unfinished.any():
            written = plans.start[at, min(self._step, plans.start.shape[1] - 1)]
            unfinished &= ~self._stops[at] | (self._first_end[at] >= plans.first_unwritten[at, written])
        self._next_done = int(plans.num_steps[at[unfinished]].min(initial=NOWHERE))
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
        return Written(tokens=tokens, nfe=self._step if text in self._texts else int(self._nfe[text]))


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
