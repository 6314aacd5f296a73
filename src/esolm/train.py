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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from torch import Tensor

from esolm import checkpoint, guard, inspection, journal, likelihood, memory, objective, plain
from esolm.algorithms.algorithm import Batch, Phase, View
from esolm.calibrate import bf16_pays
from esolm.data import Loader
from esolm.denoiser import Denoiser
from esolm.journal import Journal, Silent
from esolm.noise import Noise, generator
from esolm.optim import NotFinite, Optimizer, WeightAverage
from esolm.ranks import ALONE, Agreed, Elsewhere, Parts, Ranks
from esolm.run import Run as Run
from esolm.run import description as description
from esolm.signals import listening
from esolm.sinks import Sink
from esolm.tally import Levels, Tally, peak_memory
from esolm.tokenizer import Tokenizer

_VALIDATED_AT_ONCE = 16
_TRIES = 10  # a save that failed is tried again ten times before the next one is due, at most
_DROPOUT = 1000  # purpose of its random numbers, apart from those of the algorithms


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
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train, with checkpoints and the journal in `folder`.

    `resume` goes on from the newest checkpoint there; `start` takes the weights of another run's (to continue it or to
    fine-tune). `origin` is noted in every checkpoint: where the data came from. `sinks`: where figures go beside the
    journal, as TensorBoard. SIGINT (Ctrl-C), SIGTERM and SIGUSR1 save and return.
    `ranks`: the processes that train together, as `ranks.joined` gives them; each calls this with the same arguments.
    ValueError for what does not fit together, Diverged, TooLarge, SaveError (only if the last save fails).
    """
    _check(run, tokenizer, folder, resume=resume, start=start)
    memory.refuse_too_large(run.network, run.optim, torch.device(device))
    with listening() as signal:
        stop: object = Agreed(ranks, signal) if ranks.size > 1 else signal
        state = _State(run, tokenizer, torch.device(device), origin, ranks)
        if start is not None:
            state.take_weights(start)
        if resume:
            state.restore(folder)
        elif ranks.leads:
            journal.set_aside(folder)
        with (Journal if ranks.leads else Silent)(
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


def _loop(state: "_State", folder: Path, data: Loader, validation: Loader | None, log: Journal, stop: object) -> None:
    """Steps until the run is over, out of time or asked to stop."""
    run, ranks, began = state.run, state.ranks, time.monotonic()
    rows = ranks.rows(run.batch_size)
    tally = Tally(run.batch_size * run.network.length)
    refusals, unsaved = guard.Refusals(), False
    while state.step < run.num_steps and not stop:
        if run.minutes is not None and ranks.agree(time.monotonic() - began > 60 * run.minutes):
            break
        started, rate = time.monotonic(), run.optim.schedule.rate(state.step, run.num_steps)
        terms, levels, problem = _learned(state, data.batch(state.step, *rows, run.batch_size), log)
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
        if state.step == run.num_steps:
            break  # the last validation and the last checkpoint are the caller's
        if validation is not None and state.step % run.validate_every == 0:
            _validate(state, validation, log, stop)
        if run.sample_every is not None and state.step % run.sample_every == 0:
            _sample(state, log, stop)
        if state.step % run.save_every == 0 or (unsaved and state.step % max(1, run.save_every // _TRIES) == 0):
            unsaved = not _save(state, folder, log, last=False)


def _learned(state: "_State", batch: Batch, log: Journal) -> tuple[dict[str, float], Levels, NotFinite | None]:
    """Gradients of a batch, in micro batches that fit into memory; and the first weight or loss that is not finite."""
    ranks = state.ranks
    while True:
        levels, terms, problem = Levels(), {}, None
        try:
            with autocast(state.run, state.denoiser.device):
                terms = learn(state.working, state.denoiser, batch, state.step, levels, ranks)
        except (MemoryError, RuntimeError) as error:
            if ranks.sharded or not memory.ran_out(error):
                raise  # in shards the others wait in the middle of a pass: all end, and begin again
            problem = error.with_traceback(None)  # frames hold what filled the memory
        if not ranks.agree(problem is not None):
            break
        state.optimizer.forget()
        state.halve(problem or MemoryError("on another rank"))
        words = f"out of memory: going on with micro batches of {state.micro_batch}, the same batch and the same losses"
        log.text(state.step, "warning", words)
    ranks.reduce(state.denoiser)
    sums = ranks.sums([*terms.values(), *levels.sums.flatten().tolist()])
    terms = dict(zip(terms, sums, strict=False))
    levels.sums.copy_(torch.tensor(sums[len(terms) :]).view_as(levels.sums))
    bad = guard.bad_weight(state.weights()) or guard.bad_loss(terms, views_of(state.working, batch, state.step, ranks))
    if ranks.agree(bad is not None) and bad is None:
        bad = NotFinite("a weight of another rank", "NaN or infinite")
    return terms, levels, bad


def learn(
    run: Run, model: Denoiser, batch: Batch, step: int, levels: Levels | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Gradients of the loss of this rank's rows of a global batch, left in the parameters; returns what they add to each
    term in nats a token. (Alone, the rows are the whole batch.)

    A term is divided by the scored tokens of all texts in it, so the size of a micro batch changes no gradient but by
    what dropout drops, which is drawn for a micro batch as a whole. `levels` takes the losses by noise level.
    """
    device, views = model.cos.device, views_of(run, batch, step, ranks)
    counts: Counter[str] = Counter()
    for view in views:
        counts[view.term] += view.num_tokens
    present = {view.term for view in views}
    names = [name for name in get_args(Phase) if ranks.agree(name in present)]
    tokens = dict(zip(names, ranks.sums([counts[name] for name in names]), strict=True))
    terms = dict.fromkeys(names, 0.0)
    key = (run.seed, step, _DROPOUT, ranks.rank) if ranks.rank else (run.seed, step, _DROPOUT)
    dropped = torch.Generator(device).manual_seed(int(generator(*key).integers(2**63)))
    learned = [view for view in views if tokens[view.term]]  # the others hold nothing but prompts and padding
    passes = ranks.most(len(learned)) if ranks.sharded else len(learned)
    idle = [replace(views[0], weights=torch.zeros_like(views[0].weights))] * (passes - len(learned))
    for place, view in enumerate([*learned, *idle]):  # all ranks gather weights equally often
        ranks.accumulate(model, last=place + 1 == passes)
        loss, weighted = objective.of_view(model, view.to(device), dropped)
        loss = loss / (tokens[view.term] or 1)
        loss.backward()  # type: ignore[no-untyped-call]
        terms[view.term] += loss.item()
        if levels is not None:
            levels.add(view, weighted)
    return terms


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the run wants them so, or where they are faster and it leaves the choice."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bf16(run, device))


def in_bf16(run: Run, device: torch.device) -> bool:
    return run.dtype == "bfloat16" or (run.dtype == "auto" and bf16_pays(device))


def views_of(run: Run, batch: Batch, step: int, ranks: Ranks = ALONE) -> list[View]:
    """What a step shows the denoiser, one pass each: the terms of every micro batch of this rank's rows."""
    count, micro = len(batch.tokens), run.micro_batch or len(batch.tokens)
    first, total = (0, count) if ranks.alone else (ranks.rows(run.batch_size)[0], run.batch_size)
    views: list[View] = []
    for at in range(0, count, micro):
        stop = min(at + micro, count)
        noise = Noise(seed=run.seed, step=step, start=first + at, stop=first + stop, total=total)
        views += run.algorithm.views(batch[at:stop], noise, run.network.mask_id)
    return views


class _State:
    """What changes as a run goes on, and what its checkpoints hold."""

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        device: torch.device,
        origin: Mapping[str, Any] | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.origin = dict(origin or {})
        self.working = run  # the run with micro batches as small as memory wants them
        self.denoiser = Denoiser(run.network, torch.Generator().manual_seed(run.seed)).to(device)
        self.ranks = ranks
        if run.shard:
            dtype = torch.bfloat16 if in_bf16(run, device) else None
            self.ranks = ranks.shard(self.denoiser, list(self.denoiser.blocks), dtype)
        self.optimizer = Optimizer(self.denoiser, run.optim, self.ranks)
        decay = run.optim.average
        self.average = None if decay is None else WeightAverage(self.denoiser, decay, self.ranks)
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

    def weights(self) -> dict[str, Tensor]:
        """This rank's weights, by name."""
        return {name: self.ranks.own(parameter) for name, parameter in self.denoiser.named_parameters()}

    def snapshot(self) -> checkpoint.Checkpoint:
        like = dict(self.denoiser.named_parameters())
        return checkpoint.Checkpoint(
            step=self.step,
            model=self.ranks.wholes(self.weights(), like),
            ema=self.ranks.wholes(self.average.state(), like) if self.average else None,
            optim=self.ranks.wholes(self.optimizer.state(), like),
            config=description(self.run),
            tokenizer_json=self.tokenizer.to_json(),
            state={"seconds": self.seconds, "origin": self.origin, "micro_batch": self.working.micro_batch},
        )

    def restore(self, folder: Path) -> None:
        saved = checkpoint.load(folder)
        if saved.config["network"] != plain.to_plain(self.run.network):
            raise ValueError(f"the run in {folder} has another network: resume it with the options it began with")
        self._write(saved.model)
        self.optimizer.load(Parts(self.ranks, saved.optim))
        if self.average is not None and saved.ema is not None:
            self.average.load(Parts(self.ranks, saved.ema))
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
            self.average = WeightAverage(self.denoiser, self.average.decay, self.ranks)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        own = self.weights()
        if own.keys() != weights.keys():
            raise ValueError(f"weights of another network: {sorted(own.keys() ^ weights.keys())[0]} is in one only")
        for name, parameter in own.items():
            parameter.copy_(self.ranks.part(weights[name]))


def refuse_used(folder: Path) -> None:
    """Raise ValueError if a folder holds a run already."""
    if folder.is_dir() and checkpoint.newest(folder, warn=lambda _: None) is not None:
        raise ValueError(f"{folder} already holds a run: resume it, or choose another folder")


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


def _validate(state: _State, validation: Loader, log: Journal, stop: object) -> likelihood.Estimate | None:
    """The NELBO of the averaged weights on the first texts held out, always with the same noise."""
    run, at_once = state.run, min(_VALIDATED_AT_ONCE, state.run.validation_texts)
    texts = itertools.islice(validation.windows(at_once), max(1, run.validation_texts // at_once))
    with state.averaged(), autocast(state.run, state.denoiser.device):
        found = inspection.validation(state.denoiser, run.algorithm, texts, run.seed, stop)
        state.ranks.rest(state.denoiser)
    if found is not None:
        log.write(state.step, validation=found.nats_per_token, validation_error=found.standard_error)
    return found


def _sample(state: _State, log: Journal, stop: object) -> None:
    """Texts by the averaged weights, into the log."""
    run = state.run
    with state.averaged():
        texts = inspection.samples(state.denoiser, run.algorithm, state.tokenizer, run.sample_texts, stop)
    for text in texts:
        log.text(state.step, "sample", text)


def _save(state: _State, folder: Path, log: Journal, *, last: bool) -> bool:
    """Save; if that fails in mid-run (a full disk), say so and train on: it is tried again soon."""
    ranks, problem = state.ranks, guard.bad_weight(state.weights())
    if ranks.agree(problem is not None):
        bad = problem or NotFinite("a weight of another rank", "NaN or infinite")
        log.text(state.step, "warning", f"not saved: {bad}; the checkpoints from before are kept")
        if last:
            raise guard.diverged(bad, state.step)
        return False
    snapshot, failed = state.snapshot(), None
    try:
        if ranks.leads:
            checkpoint.save(folder, snapshot, keep=state.run.keep)
    except checkpoint.SaveError as error:
        failed = error
        if not last:
            log.text(state.step, "warning", f"{error}; training goes on and tries again")
    if not ranks.agree(failed is not None, patiently=True):
        return True
    if last:
        raise failed or Elsewhere("rank 0 could not save")
    return False
