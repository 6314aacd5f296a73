"""The training loop in plain sight: a batch, its views, their losses, one update; and what a long run needs around it.

    for step in range(first, run.num_steps):
        loss = learn(...)           views of the batch, each term divided by its tokens, backward
        optimizer.clip(); optimizer.update(rate(step)); average.update(step + 1)
        journal, validation, checkpoint: when due

Everything random is a function of (seed, step), so a resumed run is the same run. It reads no text and draws none.
"""

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from esolm import checkpoint, guard, inspection, journal, likelihood, memory, objective, plain
from esolm.algorithms.algorithm import Algorithm, Batch, View
from esolm.calibrate import bf16_pays
from esolm.data import Loader
from esolm.denoiser import Config, Denoiser
from esolm.journal import Journal
from esolm.noise import Noise, generator
from esolm.optim import Config as OptimConfig
from esolm.optim import NotFinite, Optimizer, WeightAverage
from esolm.signals import Stop, listening
from esolm.sinks import Sink
from esolm.tally import Levels, Tally, peak_memory
from esolm.tokenizer import Tokenizer

_VALIDATED_AT_ONCE = 16
_TRIES = 10  # a save that failed is tried again ten times before the next one is due, at most
_DROPOUT = 1000  # purpose of its random numbers, apart from those of the algorithms


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: the method, the network, the optimizer, and how long and how often."""

    algorithm: Algorithm
    network: Config
    num_steps: int
    batch_size: int = 512
    micro_batch: int | None = None  # texts that go through the network at once; None: the whole batch
    optim: OptimConfig = field(default_factory=OptimConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay float32
    seed: int = 0
    minutes: float | None = None  # stop and save after this long, whatever the step
    log_every: int = 10
    validate_every: int = 1000
    validation_texts: int = 256
    save_every: int = 1000
    keep: int = 3
    sample_every: int | None = None  # steps; texts of the averaged weights for the log, always with the same seeds
    sample_texts: int = 2

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("num_steps", "batch_size", "log_every", "validate_every", "save_every", "keep", "sample_texts"), 1
        )
        problems = [
            f"{name} must be at least {low}, got {getattr(self, name)}"
            for name, low in {**least, "validation_texts": 2}.items()
            if getattr(self, name) < low
        ]
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            problems.append(f"micro_batch must lie in [1, batch_size = {self.batch_size}], got {self.micro_batch}")
        if self.sample_every is not None and self.sample_every < 1:
            problems.append(f"sample_every must be at least 1, got {self.sample_every}: leave it out for no samples")
        if self.minutes is not None and not self.minutes > 0:
            problems.append(f"minutes must be positive, got {self.minutes}: leave it out for no limit")
        if problems:
            raise ValueError("; ".join(problems))
        self.algorithm.check(self.network)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its newest checkpoint, the step, the last validation, and whether it was interrupted."""

    path: Path
    step: int
    validation: likelihood.Estimate | None
    interrupted: bool
    seconds: float


def train(
    run: Run,
    folder: Path,
    *,
    tokenizer: Tokenizer,
    data: Loader,
    validation: Loader | None = None,
    resume: bool = False,
    start: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    device: str | torch.device = "cpu",
    console: Console | None = None,
) -> Outcome:
    """Train, with checkpoints and the journal in `folder`.

    `resume` goes on from the newest checkpoint there; `start` takes the weights of another run's (to continue it or to
    fine-tune). `origin` is noted in every checkpoint: where the data came from. `sinks`: where figures go beside the
    journal, as TensorBoard. SIGINT (Ctrl-C), SIGTERM and SIGUSR1 save and return.
    ValueError for what does not fit together, Diverged, TooLarge, SaveError (only if the last save fails).
    """
    _check(run, tokenizer, folder, resume=resume, start=start)
    memory.refuse_too_large(run.network, run.optim, torch.device(device))
    with listening() as stop:
        state = _State(run, tokenizer, torch.device(device), origin)
        if start is not None:
            state.take_weights(start)
        if resume:
            state.restore(folder)
        else:
            journal.set_aside(folder)
        with Journal(
            folder,
            total=run.num_steps,
            tokens_per_step=run.batch_size * run.network.length,
            resume=state.step if resume else None,
            sinks=sinks,
            facts={"method": repr(run.algorithm), "parameters": state.denoiser.num_parameters, "seed": run.seed},
            console=console,
        ) as log:
            log.begin()
            _loop(state, folder, data, validation, log, stop)
            validated = None if validation is None or stop else _validate(state, validation, log, stop)
            _save(state, folder, log, last=True)
            log.end("interrupted" if stop else "finished")
    return Outcome(
        path=folder / f"step-{state.step:09d}",
        step=state.step,
        validation=validated,
        interrupted=bool(stop),
        seconds=state.seconds,
    )


def _loop(state: "_State", folder: Path, data: Loader, validation: Loader | None, log: Journal, stop: Stop) -> None:
    """Steps until the run is over, out of time or asked to stop."""
    run, began = state.run, time.monotonic()
    tally = Tally(run.batch_size * run.network.length)
    refusals, unsaved = guard.Refusals(), False
    while state.step < run.num_steps and not stop:
        if run.minutes is not None and time.monotonic() - began > 60 * run.minutes:
            break
        started, rate = time.monotonic(), run.optim.schedule.rate(state.step, run.num_steps)
        terms, levels, problem = _learned(state, data.batch(state.step, 0, run.batch_size, run.batch_size), log)
        try:
            if problem is not None:
                raise problem
            norm = state.update(rate)
        except NotFinite as found:
            state.skip()
            log.text(state.step, "warning", f"update skipped: {found}")
            refusals.add(found, state.step)
            continue
        refusals.clear()
        tally.add(terms, levels, time.monotonic() - started)
        if state.step % run.log_every == 0 or state.step == run.num_steps:
            rest = {"rate": rate, "norm": norm, "memory": peak_memory(state.denoiser.device), "seconds": state.seconds}
            log.write(state.step, **tally.figures(), **rest)
        if run.sample_every is not None and state.step % run.sample_every == 0:
            _sample(state, log, stop)
        if state.step == run.num_steps:
            break  # the last validation and the last checkpoint are the caller's
        if validation is not None and state.step % run.validate_every == 0:
            _validate(state, validation, log, stop)
        if state.step % run.save_every == 0 or (unsaved and state.step % max(1, run.save_every // _TRIES) == 0):
            unsaved = not _save(state, folder, log, last=False)


def _learned(state: "_State", batch: Batch, log: Journal) -> tuple[dict[str, float], Levels, NotFinite | None]:
    """Gradients of a batch, in micro batches that fit into memory; and the first weight or loss that is not finite."""
    while True:
        levels = Levels()
        try:
            with autocast(state.run, state.denoiser.device):
                terms = learn(state.working, state.denoiser, batch, state.step, levels)
            break
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            problem = error.with_traceback(None)  # frames hold what filled the memory
        state.optimizer.forget()
        state.halve(problem)
        words = f"out of memory: going on with micro batches of {state.micro_batch}, the same batch and the same losses"
        log.text(state.step, "warning", words)
    bad = guard.bad_weight(dict(state.denoiser.named_parameters()))
    return terms, levels, bad or guard.bad_loss(terms, lambda: views_of(state.working, batch, state.step))


def learn(run: Run, model: Denoiser, batch: Batch, step: int, levels: Levels | None = None) -> dict[str, float]:
    """Gradients of the loss of one global batch, left in the parameters; returns each term in nats a token.

    A term is divided by the scored tokens of all texts in it, so the size of a micro batch changes no gradient but by
    what dropout drops, which is drawn for a micro batch as a whole. `levels` takes the losses by noise level.
    """
    device, views = model.embed.weight.device, views_of(run, batch, step)
    tokens: Counter[str] = Counter()
    for view in views:
        tokens[view.term] += view.num_tokens
    terms = dict.fromkeys(tokens, 0.0)
    dropped = torch.Generator(device).manual_seed(int(generator(run.seed, step, _DROPOUT).integers(2**63)))
    for view in views:
        if not tokens[view.term]:
            continue  # nothing but prompts and padding
        loss, weighted = objective.of_view(model, view.to(device), dropped)
        loss = loss / tokens[view.term]
        loss.backward()  # type: ignore[no-untyped-call]
        terms[view.term] += loss.item()
        if levels is not None:
            levels.add(view, weighted)
    return terms


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the run wants them so, or where they are faster and it leaves the choice."""
    bf16 = run.dtype == "bfloat16" or (run.dtype == "auto" and bf16_pays(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def views_of(run: Run, batch: Batch, step: int) -> list[View]:
    """What a step shows the denoiser, one pass each: the terms of every micro batch."""
    total, micro = len(batch.tokens), run.micro_batch or len(batch.tokens)
    views: list[View] = []
    for at in range(0, total, micro):
        stop = min(at + micro, total)
        noise = Noise(seed=run.seed, step=step, start=at, stop=stop, total=total)
        views += run.algorithm.views(batch[at:stop], noise, run.network.mask_id)
    return views


class _State:
    """What changes as a run goes on, and what its checkpoints hold."""

    def __init__(self, run: Run, tokenizer: Tokenizer, device: torch.device, origin: Mapping[str, Any] | None) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.origin = dict(origin or {})
        self.working = run  # the run with micro batches as small as memory wants them
        self.denoiser = Denoiser(run.network, torch.Generator().manual_seed(run.seed)).to(device)
        self.optimizer = Optimizer(self.denoiser, run.optim)
        decay = run.optim.average
        self.average = None if decay is None else WeightAverage(self.denoiser, decay)
        self.step = 0
        self._before, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent, interruptions left out."""
        return self._before + time.monotonic() - self._since

    @property
    def micro_batch(self) -> int:
        return self.working.micro_batch or self.run.batch_size

    def halve(self, problem: BaseException) -> None:
        """Smaller micro batches from now on. TooLarge if they are of one text already."""
        if self.micro_batch == 1:
            raise memory.one_text_too_large(problem, self.denoiser.device) from None
        self.working = replace(self.working, micro_batch=self.micro_batch // 2)
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()

    def skip(self) -> None:
        """A step without an update."""
        self.optimizer.forget()
        self.step += 1

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network has the averaged weights, where there are any."""
        return self.average.swapped() if self.average else nullcontext()

    def update(self, rate: float) -> float:
        """Clip, update, average; returns the norm that the gradient had. Raises NotFinite."""
        norm = self.optimizer.clip()
        self.optimizer.update(rate)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        return norm

    def snapshot(self) -> checkpoint.Checkpoint:
        return checkpoint.Checkpoint(
            step=self.step,
            model=dict(self.denoiser.named_parameters()),
            ema=self.average.state() if self.average else None,
            optim=self.optimizer.state(),
            config=description(self.run),
            tokenizer_json=self.tokenizer.to_json(),
            state={"seconds": self.seconds, "origin": self.origin, "micro_batch": self.working.micro_batch},
        )

    def restore(self, folder: Path) -> None:
        saved = checkpoint.load(folder)
        if saved.config["network"] != plain.to_plain(self.run.network):
            raise ValueError(f"the run in {folder} has another network: resume it with the options it began with")
        self._write(saved.model)
        self.optimizer.load(saved.optim)
        if self.average is not None and saved.ema is not None:
            self.average.load(saved.ema)
        self.working = replace(self.run, micro_batch=saved.state.get("micro_batch", self.run.micro_batch))
        self.step = saved.step
        self._before, self._since = float(saved.state["seconds"]), time.monotonic()

    def take_weights(self, path: Path) -> None:
        """Begin with the (averaged) weights of a checkpoint of the same network and tokenizer."""
        saved = checkpoint.load(path, optimizer=False)
        theirs, ours = saved.config["network"], plain.to_plain(self.run.network)
        for name in ours:
            if name != "dropout" and theirs.get(name) != ours[name]:
                raise ValueError(f"{path} has {name} = {theirs.get(name)}, this run {ours[name]}: choose the same")
        if saved.tokenizer_json != self.tokenizer.to_json():
            raise ValueError(f"{path} was trained with another tokenizer: train with its own (tokenizer.json in it)")
        self._write(saved.ema or saved.model)
        if self.average is not None:
            self.average = WeightAverage(self.denoiser, self.average.decay)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.denoiser.named_parameters())
        if own.keys() != weights.keys():
            raise ValueError(f"weights of another network: {sorted(own.keys() ^ weights.keys())[0]} is in one only")
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def refuse_used(folder: Path) -> None:
    """Raise ValueError if a folder holds a run already."""
    if folder.is_dir() and checkpoint.newest(folder, warn=lambda _: None) is not None:
        raise ValueError(f"{folder} already holds a run: resume it, or choose another folder")


def description(run: Run) -> dict[str, Any]:
    """What a checkpoint records of a run: enough to build the model, and the run itself."""
    data: dict[str, Any] = plain.to_plain(run)
    return {"algorithm": plain.to_plain(run)["algorithm"], "network": data["network"], "run": data}


def _check(run: Run, tokenizer: Tokenizer, folder: Path, *, resume: bool, start: Path | None) -> None:
    if tokenizer.vocab_size != run.network.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the network {run.network.vocab_size}: "
            f"set network.vocab_size to {tokenizer.vocab_size}"
        )
    if resume and start is not None:
        raise ValueError("resume goes on with the run in the folder, start begins another from its weights: choose one")
    if not resume:
        refuse_used(folder)


def _validate(state: _State, validation: Loader, log: Journal, stop: Stop) -> likelihood.Estimate | None:
    """The NELBO of the averaged weights on the first texts held out, always with the same noise."""
    run, at_once = state.run, min(_VALIDATED_AT_ONCE, state.run.validation_texts)
    texts = itertools.islice(validation.windows(at_once), max(1, run.validation_texts // at_once))
    with state.averaged(), autocast(state.run, state.denoiser.device):
        found = inspection.validation(state.denoiser, run.algorithm, texts, run.seed, stop)
    if found is not None:
        log.write(state.step, validation=found.nats_per_token, validation_error=found.standard_error)
    return found


def _sample(state: _State, log: Journal, stop: Stop) -> None:
    """Texts by the averaged weights, into the log."""
    run = state.run
    with state.averaged():
        texts = inspection.samples(state.denoiser, run.algorithm, state.tokenizer, run.sample_texts, stop)
    for text in texts:
        log.text(state.step, "sample", text)


def _save(state: _State, folder: Path, log: Journal, *, last: bool) -> bool:
    """Save; if that fails in mid-run (a full disk), say so and train on: it is tried again soon."""
    bad = guard.bad_weight(dict(state.denoiser.named_parameters()))
    if bad is not None:
        log.text(state.step, "warning", f"not saved: {bad}; the checkpoints from before are kept")
        if last:
            raise guard.diverged(bad, state.step)
        return False
    try:
        checkpoint.save(folder, state.snapshot(), keep=state.run.keep)
    except checkpoint.SaveError as problem:
        if last:
            raise
        log.text(state.step, "warning", f"{problem}; training goes on and tries again")
        return False
    return True
