"""Our models in EleutherAI's lm-evaluation-harness, by the name `esolm`; its tasks then run on them.

    python -m esolm.harness --model esolm --model_args pretrained=esolm-shakespeare --tasks lambada_openai

    import esolm.harness                                                            makes the name known
    lm_eval.simple_evaluate(model="esolm", model_args="pretrained=runs/first", tasks=["lambada_openai"])

The harness has no entry points for models, so the import is what makes ours known; `python -m esolm.harness` is the
command `lm_eval` after that import. The harness asks, cuts texts into tokens, counts and averages; likelihoods are
those of `conditional`, texts those of `sample`. An empty context is none: our models need no token to begin from.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from inspect import signature
from typing import Any, get_args

import numpy as np
import torch

from esolm import cli, conditional
from esolm.algorithms.algorithm import Request
from esolm.cli.parsing import fail
from esolm.cli.terminal import device_of
from esolm.conditional import Measure
from esolm.draw import Draw
from esolm.model import Model, load, seed_of
from esolm.noise import generator
from esolm.plain import nearest
from esolm.products import Dtype
from esolm.sample import Writer

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as problem:
    told = f'lm-evaluation-harness cannot be imported ({problem}): pip install "esolm[lm-eval]"'
    if __name__ == "__main__":
        fail(told, 2)
    raise ImportError(told, name=problem.name) from None

_AT_ONCE = 16
_LONGEST = 256  # tokens to write where nobody says how many, as elsewhere in the harness
_LOOK = 8  # steps from one look for the texts that end the writing to the next
_NUMBERS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing
_OPTIONS = {*_NUMBERS, "until", "do_sample", "temperature", "top_p", "top_k"}


@register_model("esolm")
class Harness(TemplateLM):  # type: ignore[misc]
    """A model of ours as the harness wants it; the arguments are those of `--model_args`.

    `orders` of the importance-weighted bound (0: the NELBO, from `samples` draws): see `conditional`. `context`: tokens
    that a window of a long document reads, at least, of what is before it. `alpha_0` in place of the trained one, for
    likelihoods and texts; `num_steps` for texts; `temperature` and `top_p` where a task says nothing of them. A `dtype`
    other than float32 scores with the weights that write. ValueError names what is wrong, before the model is loaded
    where that can be seen.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        dtype: Any = "float32",
        device: Any = "auto",
        batch_size: Any = _AT_ONCE,
        max_batch_size: Any = None,  # only for the harness's own search of a batch size
        orders: Any = 16,
        samples: Any = 16,
        context: Any = 0,
        seed: Any = 0,
        alpha_0: Any = None,
        num_steps: Any = None,
        temperature: Any = None,
        top_p: Any = None,
        trust_remote_code: Any = False,  # is about the harness's data, and handed to every model
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = [*signature(Harness).parameters][:-1]
            raise ValueError(f"there is no model argument {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        if pretrained is None:
            raise ValueError(
                "model_args needs pretrained=..., a run's folder, owner/name of the Hub or esolm-shakespeare"
            )
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {dtype!r}")
        self._batch_size = _AT_ONCE if batch_size in (None, "auto") else _whole("batch_size", batch_size)
        self._measure = Measure(
            orders=_whole("orders", orders),
            samples=_whole("samples", samples),
            seed=_whole("seed", seed),
            at_once=self._batch_size,
        )
        self._context = _whole("context", context)
        self._num_steps = None if num_steps is None else _whole("num_steps", num_steps)
        draw = {"temperature": temperature, "top_p": top_p}
        self._draw = {name: _number(name, value) for name, value in draw.items() if value is not None}
        _asked({}, self._draw, 1)  # says what is wrong with them
        self._model = model = load(str(pretrained), dtype=dtype, device=device_of(str(device)))
        if alpha_0 is not None:
            _set_alpha_0(model, _number("alpha_0", alpha_0))
        if not 0 <= self._context < model.length:
            raise ValueError(f"context must lie in [0, {model.length}), the model's length, got {self._context}")
        self._algorithm = model.algorithm
        self._algorithm.plan(Request(length=1, num_steps=self._num_steps), generator(0))  # refuses what it cannot do
        self._network = model.denoiser if dtype == "float32" else model.writer
        self._device = self._network.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Harness":
        """From model arguments, which come before what the command line says of the batch size and the device."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if others.get("device") == "cuda:0" and not torch.cuda.is_available():
            others["device"] = "auto"  # cuda:0 is what the harness says where nobody named a device
        return cls(**{**others, **arg_dict})

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.pad_id

    @property
    def prefix_token_id(self) -> int:
        """What the harness puts in place of an empty context: the mask, which is in no text and is left out again."""
        return self._model.tokenizer.mask_id

    @property
    def max_length(self) -> int:
        return self._model.length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task does not say how many."""
        return min(_LONGEST, self._model.length // 2)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        return f"esolm-{self._model.tokenizer.digest[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; there are no special ones to add."""
        return self._model.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise ValueError("models of esolm have no chat template: leave out --apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """What a figure must say of the model, for the harness's file of results."""
        return {
            "model_num_parameters": self._model.denoiser.num_parameters,
            "model_sha": self._model.digest,
            "method": repr(self._algorithm),
            "loglikelihood": self._told(long=False),
            "loglikelihood_rolling": self._told(long=True),
        }

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document in nats, or a lower bound of it: every token once, in windows of the model's
        length. The first reads nothing before it, the last all that fits."""
        found = []
        for (text,) in tqdm([request.args for request in requests], desc=self._told(long=True), disable=disable_tqdm):
            pairs = conditional.windows(self.tok_encode(text), 0, length=self.max_length, context=self._context)
            nats = conditional.log_likelihoods(self._network, self._algorithm, pairs, self._measure, long=True)
            found.append(sum(nats, start=0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to the first of the texts that end it. A text depends on its request
        and on how often that was made before, not on the others."""
        jobs, before = [], Counter[str]()
        for context, options in (request.args for request in requests):
            same = repr((context, options))
            asked = _asked(options, self._draw, self.max_gen_toks)
            jobs.append(self._job(self.tok_encode(context), asked, seed_of(self._measure.seed, before[same])))
            before[same] += 1
        _warn("prompts were cut from the left to fit", sum(job.cut for job in jobs), jobs, self.max_length)
        _warn("texts are shorter than asked for", sum(job.shortened for job in jobs), jobs, self.max_length)
        found = [""] * len(jobs)
        lengths = [job.request.length for job in jobs]
        for part in _batches(lengths, self._batch_size, "writing", disable_tqdm):
            for number, text in zip(part, self._written([jobs[number] for number in part]), strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, or a lower bound of it, and whether it is written greedily."""
        ids = [self._ids(*request) for request in requests]
        lengths = [len(context) + len(scored) for context, scored in ids]
        _warn("contexts were cut from the left to fit", sum(n > self.max_length for n in lengths), ids, self.max_length)
        found = [(0.0, True)] * len(ids)
        score = partial(conditional.log_likelihoods, self._network, self._algorithm)
        for part in _batches(lengths, self._batch_size, self._told(long=False), disable_tqdm):
            cut = [self._windows(*ids[number]) for number in part]
            pairs = [pair for windows in cut for pair in windows]
            nats, same = score(pairs, self._measure), self._greedy(pairs)
            for number, windows in zip(part, cut, strict=True):
                each = [(next(nats), next(same)) for _ in windows]
                found[number] = sum((value for value, _ in each), start=0.0), all(alike for _, alike in each)
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def _ids(self, texts: tuple[str, str], context: list[int], scored: list[int]) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, as the harness cut them. Where the first token of the continuation would
        belong to the last of the context, so that nothing is left to score, it is cut apart."""
        return [token for token in context if token != self.prefix_token_id], scored or self.tok_encode(texts[1])

    def _windows(self, context: list[int], scored: list[int]) -> list[conditional.Pair]:
        """One pair; more where the continuation alone is longer than the model, and then half of each may be read."""
        room = self.max_length - len(scored)
        reads = room if room > 0 else max(self._context, self.max_length // 2)
        return conditional.windows([*context, *scored], len(context), length=self.max_length, context=reads)

    def _greedy(self, pairs: Sequence[conditional.Pair]) -> Iterator[bool]:
        return conditional.greedy(
            self._model.writer,
            self._algorithm,
            pairs,
            num_steps=self._num_steps,
            seed=self._measure.seed,
            at_once=self._batch_size,
        )

    def _told(self, *, long: bool) -> str:
        kind = self._measure.kind(self._algorithm, long=long)
        number = {"NELBO": f" of {self._measure.samples} draws", "exact": ""}
        return kind + number.get(kind, f" of {self._measure.orders} orders")

    def _job(self, ids: list[int], asked: "_Asked", seed: int) -> "_Job":
        """A text to write: half of the model's length at most is taken from a prompt that does not fit."""
        new = max(1, min(asked.num_tokens, max(self.max_length - len(ids), self.max_length // 2)))
        prompt = ids[max(0, len(ids) + new - self.max_length) :]
        request = Request(
            length=len(prompt) + new,
            given=dict(enumerate(prompt)),
            num_steps=self._num_steps,
            draw=asked.draw,
            seed=seed,
        )
        cut, shortened = len(prompt) < len(ids), new < asked.num_tokens
        return _Job(request=request, start=len(prompt), until=asked.until, cut=cut, shortened=shortened)

    def _written(self, jobs: Sequence["_Job"]) -> list[str]:
        """Texts written together, until all have ended. The last steps are left out where that is seen in time."""
        tokenizer = self._model.tokenizer
        requests, steps = [job.request for job in jobs], 0
        writer = Writer(self._model.writer, self._algorithm, requests, end_id=tokenizer.end_id)
        while True:
            if not writer.active or steps % _LOOK == 0:
                texts = [
                    tokenizer.decode(_begun(text.tokens[job.start :], tokenizer.mask_id))
                    for job, text in zip(jobs, writer.texts(), strict=True)
                ]
                cut = [_before(job.until, text) for job, text in zip(jobs, texts, strict=True)]
                if not writer.active or all(a != b for a, b in zip(cut, texts, strict=True)):
                    return cut
            writer.advance()
            steps += 1


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """How a task wants a text."""

    until: tuple[str, ...]
    num_tokens: int
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A text to write: `start` tokens are the prompt's."""

    request: Request
    start: int
    until: tuple[str, ...]
    cut: bool
    shortened: bool


def _asked(options: Mapping[str, Any], draw: Mapping[str, float], num_tokens: int) -> _Asked:
    """What a task's `generation_kwargs` ask for; `draw` and `num_tokens` hold where they say nothing."""
    if unused := sorted(set(options) - _OPTIONS):
        warnings.warn(f"esolm has no use for the generation options {', '.join(unused)} of this task", stacklevel=2)
    until = options.get("until") or ()
    given = [options[name] for name in _NUMBERS if options.get(name) is not None]
    number = _whole("max_gen_toks", given[0]) if given else num_tokens
    if number < 1:
        raise ValueError(f"max_gen_toks must be at least 1, got {number}")
    sampled = options.get("do_sample")
    temperature = options.get("temperature", draw.get("temperature", 1.0 if sampled else 0.0))
    return _Asked(
        until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        num_tokens=number,
        draw=Draw(
            temperature=0.0 if sampled is False else _number("temperature", temperature),
            top_k=max(0, _whole("top_k", options.get("top_k") or 0)) or None,
            top_p=_number("top_p", options.get("top_p", draw.get("top_p", 1.0))),
        ),
    )


def _begun(tokens: np.ndarray, mask_id: int) -> list[int]:
    """Tokens before the first mask."""
    masks = (tokens == mask_id).nonzero()[0]
    return list(map(int, tokens[: masks[0] if len(masks) else len(tokens)]))


def _before(until: Sequence[str], text: str) -> str:
    """A text up to the first of those that end it."""
    return text[: min((at for end in until if (at := text.find(end)) >= 0), default=len(text))]


def _batches(lengths: Sequence[int], size: int, told: str, quiet: bool) -> Iterator[list[int]]:
    """Numbers of texts, `size` at a time, the longest first, under a bar."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    with tqdm(total=len(order), desc=told, disable=quiet) as bar:
        for at in range(0, len(order), size):
            yield order[at : at + size]
            bar.update(len(order[at : at + size]))


def _warn(what: str, count: int, of: Sequence[Any], length: int) -> None:
    if count:
        warnings.warn(f"{count} of {len(of)} {what}: the model holds {length} tokens", stacklevel=3)


def _set_alpha_0(model: Model, alpha_0: float) -> None:
    options: dict[str, Any] = {"alpha_0": alpha_0}
    if not set(options) <= {field.name for field in fields(model.algorithm)}:
        raise ValueError(f"{type(model.algorithm).__name__} takes no alpha_0: it is of Eso-LM")
    model.algorithm = replace(model.algorithm, **options)


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def main() -> None:
    """The harness's own command line, with `--with FILE` for methods of one's own before it."""
    sys.argv[1:] = cli.defined(sys.argv[1:])
    cli.run(cli_evaluate)


if __name__ == "__main__":
    main()
