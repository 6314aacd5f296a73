"""A trained model as its users hold it: network, method and tokenizer together; texts in, texts out.

    model = esolm.load("runs/demo")
    model.sample(4, prompt="JULIET.", seed=1)      model.infill("To be, or ____, that is")      model.score("O Romeo!")

Every call can be had as values too: `request` makes a `Request`, `write` yields its `Reveal`s. It trains nothing.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esolm import checkpoint, likelihood, plain, sample
from esolm.algorithms.algorithm import Algorithm, Batch, Request, recorded
from esolm.denoiser import Config, Denoiser
from esolm.draw import Draw
from esolm.inference import Inference, describe, prepared
from esolm.noise import Noise, generator
from esolm.order import Positions, Uniform
from esolm.products import Dtype
from esolm.sample import Reveal, Written
from esolm.tokenizer import Tokenizer
from esolm.whole import whole

_BLANK = re.compile("__+")
_AT_ONCE = 16  # texts written or scored together
_SEED_STRIDE = 1 << 20  # seeds of the texts of one call: seed * stride + number


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a text is: `nats` in all, over `num_tokens`; a bound for every method but an autoregressive one."""

    kind: likelihood.Kind
    nats: float
    standard_error: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.num_bytes / float(np.log(2))


def load(
    path: str | Path, *, average: bool = True, dtype: Dtype = "auto", device: str | torch.device = "cpu"
) -> "Model":
    """A model from a run's folder (its newest good step) or from one step's folder.

    `average`: the averaged weights where there are any. `dtype`: of the network's products, see `products`.
    CheckpointError if it is missing or damaged.
    """
    return of(checkpoint.load(Path(path), optimizer=False), path, average=average, dtype=dtype, device=device)


def of(
    saved: checkpoint.Checkpoint,
    path: str | Path,
    *,
    average: bool = True,
    dtype: Dtype = "auto",
    device: str | torch.device = "cpu",
) -> "Model":
    """The model of a checkpoint that is read already, from `path`; otherwise as `load`."""
    for name in ("network", "algorithm"):
        if name not in saved.config:
            raise checkpoint.CheckpointError(f"{path} does not say its {name} in config.json: use another checkpoint")
    weights = saved.ema if average and saved.ema is not None else saved.model
    try:
        config = plain.from_plain(Config, saved.config["network"])
        _refuse_other_sizes(weights, config)  # before so much memory is asked for
        denoiser = Denoiser(config).float()
        denoiser.load_state_dict(weights)
    except ValueError as problem:
        told = "; ".join(line.strip() for line in str(problem).splitlines())
        words = f"the network in config.json of {path} cannot be: {told}; use another checkpoint"
        raise checkpoint.CheckpointError(words) from None
    except RuntimeError as problem:
        if "size mismatch" not in str(problem) and "state_dict" not in str(problem):
            raise
        first = str(problem).splitlines()[1].strip().rstrip(".")
        told = f"the weights of {path} are not those of the network in its config.json ({first})"
        raise checkpoint.CheckpointError(f"{told}: use another checkpoint") from None
    return Model(
        denoiser.to(device),
        recorded(saved.config["algorithm"]),
        Tokenizer.from_json(saved.tokenizer_json),
        dtype=dtype,
        facts={"step": saved.step, **saved.state, "run": saved.config.get("run")},
    )


def _refuse_other_sizes(weights: dict[str, Tensor], config: Config) -> None:
    """ValueError unless weights have the sizes of a network, as far as two tensors and their names tell."""
    found = weights["embed.weight"].shape if "embed.weight" in weights else ()
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if (*found, layers) != (config.vocab_size, config.width, config.layers):
        sizes = f"vocab_size, width and layers are {config.vocab_size}, {config.width} and {config.layers}"
        raise ValueError(f"its {sizes}, those of the weights {', '.join(map(str, (*found, layers)))}")


def seed_of(seed: int, number: int) -> int:
    """The seed of text `number` of several that were asked for with one seed."""
    seed = whole("seed", seed)
    if not 0 <= seed < 2**43:
        raise ValueError(f"seed must lie in [0, 2^43), got {seed}")
    return seed * _SEED_STRIDE + number


class Model:
    """Network, method and tokenizer. `facts` say how it was trained."""

    def __init__(
        self,
        denoiser: Denoiser,
        algorithm: Algorithm,
        tokenizer: Tokenizer,
        *,
        dtype: Dtype = "auto",
        facts: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer.vocab_size != denoiser.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the network {denoiser.config.vocab_size}: "
                "they do not belong together"
            )
        algorithm.check(denoiser.config)
        self.denoiser = denoiser.eval()  # in float32, to score with
        rows = algorithm.plan(Request(length=denoiser.config.length), generator(0)).rows_fed.mean()
        self.writer = prepared(denoiser, dtype, rows=round(float(rows)))  # as it is fastest here, to write with
        self.algorithm = algorithm
        self.tokenizer = tokenizer
        self.facts = facts or {}
        self._dtype = dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, has a writer of its own: one points into its process's memory."""
        return _made, (self.denoiser, self.algorithm, self.tokenizer, self._dtype, self.facts)

    @property
    def length(self) -> int:
        """The longest text, in tokens."""
        return self.denoiser.config.length

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights: equal digests, equal networks."""
        found = hashlib.sha256()
        for name, weight in sorted(self.denoiser.named_parameters()):
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def request(
        self,
        *,
        prompt: str = "",
        suffix: str = "",
        length: int | None = None,
        seed: int = 0,
        alpha_0: float | None = None,
        num_steps: int | None = None,
        positions: Positions | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Request:
        """A text to write: after `prompt`, before `suffix`, of `length` tokens in all (the model's, if left out).

        `num_steps` counts diffusion steps (None: one token a step); `alpha_0` is the share that diffusion writes
        (None: as trained). ValueError for what the model cannot do.
        """
        length = self.length if length is None else whole("length", length)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        multiple = self.algorithm.length_multiple
        if length % multiple:
            raise ValueError(
                f"length {length} is not divisible by block_size {multiple}, in which the model writes: "
                f"use a length of {max(1, length // multiple) * multiple}"
            )
        first, last = self.tokenizer.encode(prompt), self.tokenizer.encode(suffix)
        if len(first) + len(last) > min(length, self.length):
            raise ValueError(
                f"the prompt has {len(first) + len(last)} tokens and the text {length} (the model's longest is "
                f"{self.length}): shorten the prompt{'' if length >= self.length else ' or raise length'}"
            )
        given = dict(enumerate(first)) | {length - len(last) + i: token for i, token in enumerate(last)}
        return Request(
            length=length,
            given=given,
            alpha_0=alpha_0,
            num_steps=num_steps,
            positions=positions or Uniform(),
            draw=Draw(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=seed,
            stop_at_end=not last,
        )

    def gaps(self, text: str, *, tokens: int | None = None, **options: Any) -> Request:
        """A text with blanks (two or more underscores) to fill: each of `tokens` tokens, or one for each underscore.

        A space before a blank is the model's to write, since its tokens begin with their space. `options` are those of
        `request` but the ones that the text decides: prompt, suffix and length. In BD3-LM the last block ends with the
        text. ValueError for AR unless the only blank stands at the end.
        """
        if decided := sorted({"prompt", "suffix", "length"} & set(options)):
            raise ValueError(f"a text with blanks takes no {' or '.join(decided)}: write it into the text")
        given: dict[int, int] = {}
        at = 0
        if tokens is not None and whole("tokens", tokens) < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}: leave it out for one of each underscore")
        blanks = [len(blank.group()) for blank in _BLANK.finditer(text)]
        if not blanks:
            raise ValueError(f"there is no blank in {text!r}: mark each with underscores, as in 'To be, or ____, that'")
        for piece, blank in zip(_BLANK.split(text), [*blanks, 0], strict=True):
            kept = piece.removesuffix(" ") if blank else piece
            for token in self.tokenizer.encode(kept):
                given[at] = token
                at += 1
            if blank:
                at += blank if tokens is None else tokens
        if at > self.length:
            raise ValueError(f"the text has {at} tokens with its blanks, the model holds {self.length}: shorten it")
        return replace(self.request(**options), length=at, given=given, stop_at_end=False)

    def write(self, requests: Sequence[Request]) -> Iterator[Reveal]:
        """Write texts together, yielding what each step reveals."""
        return sample.write(self.writer, self.algorithm, requests, end_id=self.tokenizer.end_id)

    def complete(self, requests: Sequence[Request]) -> list[Written]:
        """Write texts to their ends, a few at a time. A text does not depend on the others."""
        written: list[Written] = []
        for at in range(0, len(requests), _AT_ONCE):
            part = requests[at : at + _AT_ONCE]
            written += sample.complete(self.writer, self.algorithm, part, end_id=self.tokenizer.end_id)
        return written

    def sample(self, num: int = 1, *, seed: int = 0, **options: Any) -> list[str]:
        """`num` texts; options are those of `request`. Text `i` of a seed is the same whatever `num` is."""
        if whole("num", num) < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        request = self.request(**options)
        requests = [replace(request, seed=seed_of(seed, number)) for number in range(num)]
        return [self.tokenizer.decode(written.tokens.tolist()) for written in self.complete(requests)]

    def infill(self, text: str, *, tokens: int | None = None, seed: int = 0, **options: Any) -> str:
        """The text with its blanks filled; options are those of `request`."""
        (written,) = self.complete([self.gaps(text, tokens=tokens, seed=seed_of(seed, 0), **options)])
        return self.tokenizer.decode(written.tokens.tolist())

    def score(self, text: str, *, samples: int = 16, seed: int = 0) -> Score:
        """How likely a text is: exactly where nothing is written by diffusion (AR), else the NELBO from `samples` draws
        with its Monte Carlo error (NaN for one draw).

        A text longer than the model is scored window by window, each without what came before it. End-of-text is not
        scored; `evaluate` scores it too.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ValueError("there is no text to score: it is empty")
        if whole("samples", samples) < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        exact = self.algorithm.bound_is_exact
        samples = 1 if exact else samples
        nats, variance = 0.0, 0.0
        for at in range(0, len(ids), self.length):
            batch = self._repeated(ids[at : at + self.length], samples)
            each = likelihood.nelbo(self.denoiser, self.algorithm, batch, _draws(seed, at, samples))
            nats += float(each.mean())
            variance += float(each.var()) / samples if samples > 1 else float("nan")
        return Score(
            kind="exact" if exact else "NELBO",
            nats=nats,
            standard_error=0.0 if exact else variance**0.5,
            num_tokens=len(ids),
            num_bytes=len(text.encode()),
        )

    def info(self) -> dict[str, str]:
        """What it is, as labels and values to print."""
        config = self.denoiser.config
        told = {
            "method": repr(self.algorithm),
            "parameters": f"{self.denoiser.num_parameters:,}",
            "network": f"{config.layers} layers, width {config.width}, {config.heads} heads, length {config.length}",
            "vocabulary": f"{config.vocab_size:,} ids, the last is the mask",
            "products": describe(self.writer),
        }
        if isinstance(self.writer, Inference) and self.writer.lacking:
            told["engine"] = f"none, torch writes: {self.writer.lacking}"
        try:
            return told | self._recorded()
        except (AttributeError, LookupError, TypeError, ValueError):
            words = "what the checkpoint records of its run is not what esolm writes: use another checkpoint"
            raise checkpoint.CheckpointError(words) from None

    def _recorded(self) -> dict[str, str]:
        """What a checkpoint says of where it came from."""
        told, run = {}, self.facts.get("run")
        if run:
            rate = run["optim"]["schedule"]["peak"]
            told["trained"] = (
                f"{self.facts['step']:,} of {run['num_steps']:,} steps of {run['batch_size']} texts, "
                f"learning rate {rate:g}, seed {run['seed']}, {self.facts.get('seconds', 0) / 60:.1f} minutes"
            )
        if imported := self.facts.get("imported"):
            told["imported"] = f"from {imported['from']} ({imported['found']}), weights {imported['weights']}"
        if source := self.facts.get("origin"):
            told["data"] = _told_of(source)
        return told

    def _repeated(self, ids: list[int], samples: int) -> Batch:
        """One text `samples` times, padded to a length that the method can take."""
        length = -(-len(ids) // self.algorithm.length_multiple) * self.algorithm.length_multiple
        tokens = torch.full((samples, length), self.tokenizer.pad_id)
        tokens[:, : len(ids)] = torch.tensor(ids)
        valid = (torch.arange(length) < len(ids)).expand(samples, -1)
        return Batch(tokens=tokens, given=torch.zeros_like(valid), valid=valid)


def _made(denoiser: Denoiser, algorithm: Algorithm, tokenizer: Tokenizer, dtype: Dtype, facts: dict[str, Any]) -> Model:
    return Model(denoiser, algorithm, tokenizer, dtype=dtype, facts=facts)


def _told_of(origin: Mapping[str, Any]) -> str:
    """Where data came from, as `prepare` recorded it: of one source, or of several by weight."""
    if "sources" in origin:
        parts = zip(origin["sources"], origin["weights"], strict=True)
        return ", ".join(f"{_told_of(source)} (weight {weight:g})" for source, weight in parts)
    return f"{origin['data']}{', prompts and answers' if origin['pairs'] else ''}"


def _draws(seed: int, step: int, samples: int) -> Noise:
    return Noise(seed=seed, step=step, start=0, stop=samples, total=samples)
