"""How weights change: AdamW as in the paper, the learning rate of every step, clipping, the averaged weights.

    rate(step) = peak * min(1, (step + 1) / warmup) * decay(step)
    average <- d average + (1 - d) weights,   d = min(0.9999, (1 + n) / (10 + n)) after n updates

The rate is a pure function of the step, and all state is named tensors, exact to the bit, so a resumed run is
the same run. Of a network in shards each rank updates its own part. It does not scale losses or accumulate gradients.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from esolm.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate: linear warm-up to `peak`, then constant, or a fall to `final` times the peak.

    `warmup` is a number of steps; below 1 it is a share of the run. (The paper: 3e-4, 2,500 steps, constant.
    The authors' first step has rate 0; ours has the rate of their second, and so on.)
    """

    peak: float = 3e-4
    warmup: int | float = 2500
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise ValueError(f"peak must be a positive learning rate, got {self.peak}")
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"warmup must be a number of steps or a share in [0, 1), got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is a share of the peak and must lie in [0, 1], got {self.final}")
        if self.final and self.decay == "constant":
            raise ValueError(f"final={self.final} needs decay='cosine' or 'linear'; constant has no final rate")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of update number `step` (the first is 0) in a run of `total` updates."""
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total
        if step + 1 < warmup:
            return self.peak * (step + 1) / warmup
        if self.decay == "constant":
            return self.peak
        done = min(1.0, max(0.0, (step + 1 - warmup) / max(1.0, total - warmup)))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.final + (1 - self.final) * left)


@dataclass(frozen=True, kw_only=True)
class Config:
    """AdamW with its schedule, clipping (or None) and the decay of the averaged weights (or None)."""

    schedule: Schedule = field(default_factory=Schedule)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    average: float | None = 0.9999

    def __post_init__(self) -> None:
        problems = [
            f"{name} must lie in [0, 1), got {value}"
            for name, value in (
                ("beta 1", self.betas[0]),
                ("beta 2", self.betas[1]),
                ("average", self.average),
            )
            if value is not None and not 0 <= value < 1
        ]
        if not self.epsilon > 0:
            problems.append(f"epsilon must be positive, got {self.epsilon}")
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            problems.append(f"clip must be positive (or None for no clipping), got {self.clip}")
        if problems:
            raise ValueError("; ".join(problems))


class NotFinite(ArithmeticError):
    """Something is NaN or infinite; nothing was updated. `name` is that of the first such tensor."""

    def __init__(self, name: str, kind: str, what: str = "the gradient of") -> None:
        super().__init__(f"{what} {name} is {kind}; no update was made. Lower the learning rate or clip harder")
        self.name, self.kind, self.what = name, kind, what


class Optimizer:
    """AdamW over the parameters of a model that want gradients, with its state by parameter name.

    Norms, biases and embeddings (anything of one dimension, any `nn.Embedding`) are not decayed.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks = ALONE) -> None:
        self.config, self._ranks = config, ranks
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no parameter that wants a gradient; nothing would be trained")
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._own = {name: ranks.own(p) for name, p in self.parameters.items()}
        self._stepped = {name: _in_vectors(self._own[name], p) for name, p in self.parameters.items()}
        bare = {name for name, p in self.parameters.items() if p.ndim < 2 or id(p) in embeddings}
        plain = [stepped for name, stepped in self._stepped.items() if name in bare]
        decayed = [stepped for name, stepped in self._stepped.items() if name not in bare]
        self._adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.schedule.peak,
            betas=config.betas,
            eps=config.epsilon,
            fused=True,  # on two cores and 14 M parameters: 8 ms against 37 (foreach) and 19 (a loop)
        )
        for parameter in self._stepped.values():  # torch makes these lazily; a checkpoint wants them whole
            self._adamw.state[parameter] = _moments(parameter)

    def clip(self) -> float:
        """Scale the gradients down to the configured norm and return the norm they had (over all parameters).

        Raises NotFinite, before anything is changed, when a gradient is NaN or infinite.
        """
        gradients = {name: self._ranks.own(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        if not gradients:
            return 0.0
        norms = self._ranks.norms(torch.stack([_norm(gradient) for gradient in gradients.values()]))
        norm = float(torch.linalg.vector_norm(norms))
        if not math.isfinite(norm):
            bad = int(torch.nonzero(~torch.isfinite(norms))[0])
            raise NotFinite(list(gradients)[bad], "NaN" if norms[bad].isnan() else "infinite")
        if self.config.clip is not None and norm > self.config.clip:
            torch._foreach_mul_(list(gradients.values()), self.config.clip / norm)
        return norm

    def update(self, rate: float) -> None:
        """One step of AdamW at this learning rate; the gradients are gone afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        padded = {name: own for name, own in self._own.items() if self._stepped[name] is not own}
        for name, parameter in self.parameters.items():
            gradient = None if parameter.grad is None else self._ranks.own(parameter.grad)
            if name in padded:
                _front(self._stepped[name].data, padded[name]).copy_(padded[name].detach())
                gradient = None if gradient is None else _padded(gradient)
            self._stepped[name].grad = gradient
        self._adamw.step()
        for name, own in padded.items():
            own.data.copy_(_front(self._stepped[name].data, own))
        self.forget()

    def forget(self) -> None:
        """Drop the gradients without an update."""
        for parameter in (*self.parameters.values(), *self._stepped.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments and update counts: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`.

        The tensors are the live ones: save or clone them before the next update.
        """
        return {
            f"{kind}.{name}": _front(self._adamw.state[self._stepped[name]][kind], own)
            for name, own in self._own.items()
            for kind in _KINDS
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError when names or shapes are not this model's."""
        own = self.state()
        if not state:
            raise ValueError("the checkpoint holds no optimizer state; it can be read or trained from, not resumed")
        _match(own, state, "optimizer state")
        for name, tensor in own.items():
            tensor.copy_(state[name])


class WeightAverage:
    """Averaged weights in float32, by parameter name: a checkpoint's `ema`, read like the model's weights."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, ranks: Ranks = ALONE) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._live = {name: ranks.own(p) for name, p in model.named_parameters()}
        self._average = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move the average towards the weights, after update number `count` of the run (the first is 1)."""
        decay = min(self.decay, (1 + count) / (10 + count))
        weights = [parameter.detach().float() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights (the live tensors: save or clone them before the next update)."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over averaged weights. Raises ValueError when names or shapes are not this model's."""
        _match(self._average, state, "averaged weights")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, to the bit."""
        own = [parameter.detach().clone() for parameter in self._live.values()]
        try:
            self._write(self._average.values())
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, tensors: Iterable[Tensor]) -> None:
        for parameter, tensor in zip(self._live.values(), tensors, strict=True):
            parameter.copy_(tensor)


_KINDS = ("exp_avg", "exp_avg_sq", "step")
_VECTOR = 16  # numbers that a processor works on at once, or a multiple of them


def _in_vectors(own: Tensor, parameter: Tensor) -> Tensor:
    """What AdamW is given in the place of a rank's part of a parameter: where rows fill no vectors, a copy with zeros
    behind it. Its kernel rounds the second moment of the last numbers, those that fill none, otherwise than that of the
    others, and which numbers are last depends on how shards cut a parameter."""
    whole = parameter.device.type != "cpu" or (parameter.ndim > 1 and parameter[0].numel() % _VECTOR == 0)
    return own if whole else nn.Parameter(_padded(own.detach()))


def _padded(tensor: Tensor) -> Tensor:
    return nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % _VECTOR))


def _front(padded: Tensor, like: Tensor) -> Tensor:
    """The numbers of a padded tensor that are some tensor's, in the same memory. One number is itself."""
    return padded.view(-1)[: like.numel()].view_as(like) if padded.ndim else padded


def _norm(gradient: Tensor) -> Tensor:
    """In float64, from the norms of rows: the same but for its last bits however shards cut a network, which is by
    rows. All of it in float64 would take 18 times as long (docs/log.md)."""
    rows = gradient if gradient.ndim < 2 else torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}


def _match(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    for name in [*own, *given]:
        if name not in given or name not in own:
            problem = "is missing" if name not in given else "is not known to this model"
            raise ValueError(f"{what} of another model: {name} {problem}")
        ours, theirs = (f"{tuple(t.shape)} of {t.dtype}" for t in (own[name], given[name]))
        if ours != theirs:
            raise ValueError(f"{what} of another model: {name} is {theirs}, this model has {ours}")
