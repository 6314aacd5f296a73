"""What an algorithm is: a `View` (what the denoiser is shown, and which rows carry which loss) and a `Plan` (in what
order a text is written, and how many tokens a step).

    loss = sum(view.weights * cross_entropy(denoiser(view), view.targets)) / view.num_tokens, summed over views

It holds the values and the interface, and no method's choices.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from esolm import plain
from esolm.attention import PADDING
from esolm.denoiser import Config
from esolm.draw import Draw
from esolm.noise import Noise
from esolm.order import Positions, Uniform
from esolm.types import RowFlags, Rows, RowWeights, TextFlags, Texts
from esolm.whole import whole

Phase = Literal["diffusion", "sequential"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts to learn from or to score. `given` tokens are a prompt: always clean, never scored. Invalid ones pad."""

    tokens: Texts
    given: TextFlags
    valid: TextFlags

    @staticmethod
    def of(tokens: Texts) -> "Batch":
        """A batch of whole texts: nothing given, nothing padded."""
        return Batch(tokens=tokens, given=torch.zeros_like(tokens).bool(), valid=torch.ones_like(tokens).bool())

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        return Batch(tokens=self.tokens[rows], given=self.given[rows], valid=self.valid[rows])

    @property
    def scored(self) -> TextFlags:
        return self.valid & ~self.given


@dataclass(frozen=True, kw_only=True)
class View:
    """One pass of the denoiser: rows with their places, stages and publicity, and what they are to predict.

    `weights` is zero where a row has no target. `num_tokens` is the number of scored tokens of the texts shown, by
    which the term is divided. `times` are those of the rows' noise, for the log; None where no time was drawn.
    """

    term: Phase
    tokens: Rows
    positions: Rows
    stage: Rows
    public: RowFlags
    targets: Rows
    weights: RowWeights
    num_tokens: int
    times: Float64[Tensor, "batch #row"] | None = None

    def to(self, device: torch.device) -> "View":
        """The same view on a device."""
        names = ("tokens", "positions", "stage", "public", "targets", "weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to write: tokens given at positions, and how to write the rest. `None` leaves a choice to the algorithm.

    `num_steps` counts diffusion steps (of each block, for BD3-LM); None is one token a step. ValueError for
    what cannot be.
    """

    length: int
    given: Mapping[int, int] = field(default_factory=dict)
    alpha_0: float | None = None
    num_steps: int | None = None
    positions: Positions = field(default_factory=Uniform)
    draw: Draw = field(default_factory=Draw)
    seed: int = 0
    stop_at_end: bool = True

    def __post_init__(self) -> None:
        for name in ("length", "num_steps", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name)))
        given = [(whole("a given position", at), whole("a given token", token)) for at, token in self.given.items()]
        object.__setattr__(self, "given", dict(given))
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}: leave it out for one token a step")
        outside = [position for position in self.given if not 0 <= position < self.length]
        if outside:
            raise ValueError(
                f"given positions must lie in [0, {self.length}), got {outside[0]}: shorten the prompt or raise length"
            )

    @cached_property
    def fixed(self) -> np.ndarray:
        """The given positions, ascending."""
        return np.array(sorted(self.given), dtype=np.int64)

    @cached_property
    def free(self) -> np.ndarray:
        """The positions to write, ascending."""
        return np.setdiff1d(np.arange(self.length), self.fixed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one text is written. Ranks count positions in the order of writing; given ones come first where they can.

    Step `s` writes ranks `[start, stop)`. It feeds the ranks from the first not yet cached up to `shown`: tokens below
    `closed` (they are public and enter the cache), tokens from there to `start` (read, not kept), and masks.

        rank      0 ........ cached ...... closed ...... start ...... stop ...... shown
                  in the cache  enter the cache  tokens, not kept  masks to draw   masks to see only
    """

    order: np.ndarray  # [length] position at each rank
    token_stage: np.ndarray  # [length] stage of a row that holds its token
    mask_stage: np.ndarray  # [length] stage of a row that holds a mask
    masks_public: bool  # may later stages read rows that are not in the cache?
    shifted: bool  # rows hold the token of the rank before (AR), so a row is drawn from the token before it
    closed: np.ndarray  # [steps]
    start: np.ndarray  # [steps]
    stop: np.ndarray  # [steps]
    shown: np.ndarray  # [steps]
    sequential: np.ndarray  # [steps] True in the sequential phase

    @property
    def num_steps(self) -> int:
        return len(self.start)

    @property
    def rows_fed(self) -> np.ndarray:
        """Rows that each step feeds: all up to `shown` but those that the steps before left in the cache."""
        kept: np.ndarray = np.concatenate((np.zeros_like(self.closed[:1]), self.closed[:-1]))
        fed: np.ndarray = self.shown - kept
        return fed


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A method of learning and writing text, as a value: its options are its fields."""

    @property
    @abstractmethod
    def bound_is_exact(self) -> bool:
        """Is the bound the log-likelihood itself (nothing is written by diffusion)?"""

    @property
    @abstractmethod
    def one_pass(self) -> bool:
        """Has it an exact likelihood under each of its orders in one pass (`exact`, `orders`)?"""

    @property
    @abstractmethod
    def length_multiple(self) -> int:
        """What the length of every text must be a multiple of."""

    def check(self, config: Config) -> None:  # noqa: B027 - most methods fit every network
        """Raise ValueError if the method does not fit a network of this configuration."""

    @abstractmethod
    def views(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        """What to learn from: every text of the batch in one of the terms of the training loss."""

    @abstractmethod
    def bound(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        """What to score: every text of the batch in every term of the negative ELBO, with its true weights."""

    def exact(self, batch: Batch, order: Int64[Tensor, "batch length"], mask_id: int) -> View:
        """The log-likelihood of texts under one order of writing, one token a step, in one pass.

        ValueError if the method has no such pass (MDLM, BD3-LM: a pass there scores one set of masks only).
        """
        raise ValueError(f"{type(self).__name__} has no exact likelihood in one pass: use its bound (NELBO)")

    def orders(self, batch: Batch, noise: Noise) -> Int64[Tensor, "batch length"]:
        """Orders of writing, drawn as the method draws them: for `exact`, and for the importance-weighted bound."""
        raise ValueError(f"{type(self).__name__} has no exact likelihood in one pass: use its bound (NELBO)")

    @abstractmethod
    def plan(self, request: Request, rng: np.random.Generator) -> Plan:
        """How a request is written; random choices come from `rng`, which is the request's own."""


def recorded(data: Any) -> Algorithm:
    """The method that a checkpoint records. ValueError with what to do for one that is not defined here: it is the
    user's own, and a checkpoint names no code to run."""
    known, name = plain.classes(Algorithm), data.get("type") if isinstance(data, dict) else None  # type: ignore[type-abstract]
    if isinstance(name, str) and name not in known:
        raise ValueError(
            f"the checkpoint's method {name[:60]!r} is not defined here: name the file that defines it "
            "(esolm --with FILE ...; in Python own.define(FILE)), or upgrade esolm"
        )
    return plain.from_plain(Algorithm, data)  # type: ignore[type-abstract]


def refuse(algorithm: Algorithm, request: Request, **unused: object) -> None:
    """Raise ValueError for options of a request that this algorithm would silently ignore."""
    default = Request(length=1)
    for name, why in unused.items():
        if getattr(request, name) != getattr(default, name):
            raise ValueError(f"{type(algorithm).__name__} takes no {name}: {why}")


def share_of_batch(noise: Noise, share: float) -> tuple[Bool[Tensor, "batch"], Float64[Tensor, "batch"], int]:
    """Which rows belong to a `share` of the global batch, spread evenly so that any part of it has its share.

    Returns the flags, each such row's index among them, and their number in the global batch.
    """
    row = torch.arange(noise.start, noise.stop, dtype=torch.float64)
    count = torch.floor(row * share + 1e-9)  # rounding: 0.1 * 10 must count as 1
    chosen = torch.floor((row + 1) * share + 1e-9) > count
    return chosen, count, int(noise.total * share + 1e-9)


def clean_tokens(
    batch: Batch, alpha: Float64[Tensor, "batch _"], uniform: Float64[Tensor, "batch length"]
) -> TextFlags:
    """Which tokens stay clean: each with probability `alpha`, and every given one; padding counts as clean."""
    return (uniform < alpha) | ~batch.scored


def padded(stage: Rows, public: RowFlags, valid: RowFlags) -> tuple[Rows, RowFlags]:
    """Stages and publicity with padding rows set aside, where there are any."""
    return stage.masked_fill(~valid, PADDING), public & valid
