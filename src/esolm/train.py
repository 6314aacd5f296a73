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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from esolm import checkpoint, guard, inspection, journal, likelihood, memory, objective
from esolm.algorithms.algorithm import Batch, Phase, View
from esolm.data import Batches
from esolm.denoiser import Denoiser
from esolm.journal import Journal, Silent
from esolm.noise import Noise, generator
from esolm.optim import NotFinite
from esolm.pairs import Pairs, taken
from esolm.ranks import ALONE, Agreed, Ranks
from esolm.run import Run as Run
from esolm.run import description as description
from esolm.saving import Saving
from esolm.signals import listening
from esolm.sinks import Sink
from esolm.state import State, in_bf16
from esolm.tally import Levels, Tally, peak_memory
from esolm.tokenizer import Tokenizer

_VALIDATED_AT_ONCE = 16
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
    data: Batches,
    validation: Batches | None = None,
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
    with ranks.together():
        _check(run, tokenizer, folder, resume=resume, start=start)
        memory.refuse_too_large(run.network, run.optim, torch.device(device), parts=ranks.size if run.shard else 1)
    with listening() as signal:
        stop: object = signal if ranks.alone else Agreed(ranks, signal)
        state = State(run, tokenizer, torch.device(device), origin, ranks)
        if start is not None:
            state.take_weights(start)
        if resume:
            state.restore(folder)
        elif ranks.leads:
            journal.set_aside(folder)
        with ranks.together():
            log = (Journal if ranks.leads else Silent)(
                folder,
                total=run.num_steps,
                tokens_per_step=run.batch_size * run.network.length,
                resume=state.step if resume else None,
                sinks=sinks,
                facts=state.facts(),
                console=console,
            )
        with log:
            log.begin()
            saving = Saving(folder, run.save_every, run.keep, lambda *told: log.text(state.step, *told), ranks)
            with saving:
                _loop(state, saving, data, validation, log, stop)
                validated = None if validation is None or stop else _validate(state, validation, log, stop)
                _save(state, saving, last=True)
            log.end("interrupted" if stop else "finished")
    return Outcome(
        path=folder / f"step-{state.step:09d}",
        step=state.step,
        validation=validated,
        interrupted=bool(stop),
        seconds=state.seconds,
    )


def _loop(state: State, saving: Saving, data: Batches, validation: Batches | None, log: Journal, stop: object) -> None:
    """Steps until the run is over, out of time or asked to stop."""
    run, ranks, began = state.run, state.ranks, time.monotonic()
    rows = ranks.rows(run.batch_size)
    tally, refusals = Tally(run.batch_size * run.network.length), guard.Refusals()
    while state.step < run.num_steps and not stop:
        if run.minutes is not None and ranks.agree(time.monotonic() - began > 60 * run.minutes):
            break
        started, rate = time.monotonic(), run.optim.schedule.rate(state.step, run.num_steps)
        terms, levels, problem = _learned(state, data.batch(state.step, *rows, run.batch_size), saving)
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
        if saving.due(state.step):
            _save(state, saving, last=False)
        saving.look()


def _learned(state: State, batch: Batch, saving: Saving) -> tuple[dict[str, float], Levels, NotFinite | None]:
    """Gradients of a batch, in micro batches that fit into memory; and the first weight or loss that is not finite."""
    ranks = state.ranks
    while True:
        levels, terms, problem = Levels(), {}, None
        try:
            with autocast(state.working, state.denoiser.device):
                terms = learn(state.working, state.denoiser, batch, state.step, levels, ranks)
        except (MemoryError, RuntimeError) as error:
            if ranks.sharded or not memory.ran_out(error):
                raise  # in shards the others wait in the middle of a pass: all end, and begin again
            problem = error.with_traceback(None)  # frames hold what filled the memory
        if not ranks.agree(problem is not None):
            break
        state.optimizer.forget()
        if saving.forget():
            continue  # the copy of the last save may be what was too much
        state.halve(problem or MemoryError("on another rank"))
        words = f"out of memory: going on with micro batches of {state.micro_batch}, the same batch and the same losses"
        saving.tell("warning", words)
    bad = guard.bad_weight(state.weights())
    bad = bad or guard.bad_loss(terms, lambda: views_of(state.working, batch, state.step, ranks))
    bad = guard.everywhere(bad, ranks)
    if bad is None:
        ranks.reduce(state.denoiser)
    names, sums = list(terms), ranks.sums([*terms.values(), *levels.sums.flatten().tolist()])
    levels.sums.copy_(torch.tensor(sums[len(names) :], dtype=torch.float64).view_as(levels.sums))
    return dict(zip(names, sums, strict=False)), levels, bad


def learn(
    run: Run, model: Denoiser, batch: Batch, step: int, levels: Levels | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Gradients of the loss of this rank's rows of a global batch (alone: all rows), left in the parameters; returns
    what they add to each term in nats a token.

    A term is divided by the scored tokens of all texts in it, so the size of a micro batch changes no gradient but by
    what dropout drops, which is drawn for a micro batch as a whole. `levels` takes the losses by noise level.
    """
    device, portions = model.cos.device, _portions(run, batch, step, ranks)
    views = [*itertools.chain(*portions)]
    tokens = _tokens_by_term(views, ranks)
    terms = dict.fromkeys(tokens, 0.0)
    learned = [[view for view in portion if tokens[view.term]] for portion in portions]  # no mere prompts and padding
    passes = sum(map(len, learned))
    if ranks.sharded:  # all ranks gather weights equally often, and each portion has gradients
        idle = replace(views[0], weights=torch.zeros_like(views[0].weights))
        learned = [portion or [idle] for portion in learned]
        passes = sum(map(len, learned))
        learned[-1] += [idle] * (ranks.most(passes) - passes)
        passes = sum(map(len, learned))
    sums = Pairs()
    for acting, portion in zip(ranks.acting(), learned, strict=True):
        key = (run.seed, step, _DROPOUT, acting.rank) if acting.rank else (run.seed, step, _DROPOUT)
        dropped = torch.Generator(device).manual_seed(int(generator(*key).integers(2**63)))
        for count, view in enumerate(portion, 1):
            passes -= 1
            ranks.accumulate(model, ends=count == len(portion), last=not passes)
            loss, weighted = objective.of_view(model, view.to(device), dropped)
            loss = loss / (tokens[view.term] or 1)
            loss.backward()  # type: ignore[no-untyped-call]
            terms[view.term] += loss.item()
            if levels is not None:
                levels.add(view, weighted)
        if not ranks.sharded:
            sums.give(taken(model))
        elif passes:  # FSDP has them, and leaves zeros until the last portion
            taken(model)
    for parameter, gradient in sums.take().items():
        parameter.grad = gradient
    return terms


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """Matrix products in bf16 where the run wants them so, or where they are faster and it leaves the choice."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bf16(run, device))


def _tokens_by_term(views: Sequence[View], ranks: Ranks) -> dict[str, float]:
    """The scored tokens of each term in the global batch, of the terms that some rank has."""
    own: Counter[str] = Counter()
    for view in views:
        own[view.term] += view.num_tokens
    found = ranks.gather([own.get(term, -1) for term in get_args(Phase)])  # -1: not in this rank's rows
    return {
        term: sum(max(0, count) for count in counts)
        for term, *counts in zip(get_args(Phase), *found, strict=True)
        if max(counts) >= 0
    }


def _portions(run: Run, batch: Batch, step: int, ranks: Ranks) -> list[list[View]]:
    """The views of a step, by portion of this rank's rows."""
    total = len(batch.tokens) if ranks.alone else run.batch_size
    first, acting = ranks.rows(total)[0], ranks.acting()
    rows = [each.rows(total) for each in acting]
    return [
        views_of(run, batch[begin - first : end - first], step, each)
        for each, (begin, end) in zip(acting, rows, strict=True)
    ]


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


def _validate(state: State, validation: Batches, log: Journal, stop: object) -> likelihood.Estimate | None:
    """The NELBO of the averaged weights on the first texts held out, always with the same noise."""
    run, count = state.run, state.run.validation_texts
    at_once = min(_VALIDATED_AT_ONCE, count)
    windows = zip(range(0, count, at_once), validation.windows(at_once), strict=False)
    texts = [batch[: count - at] for at, batch in windows]
    with state.averaged(), autocast(state.working, state.denoiser.device):
        found = inspection.validation(state.denoiser, run.algorithm, texts, run.seed, stop)
        state.ranks.rest(state.denoiser)
    if found is not None:
        num_bytes, finite = inspection.num_bytes(state.tokenizer, texts), found.nats_per_token < float("inf")
        state.validation = found.nats_per_token if finite else None
        state.bits_per_byte = found.bits_per_byte(num_bytes) if finite and num_bytes else None
        log.write(state.step, validation=found.nats_per_token, validation_error=found.standard_error)
    return found


def _sample(state: State, log: Journal, stop: object) -> None:
    """Texts by the averaged weights, into the log."""
    with state.averaged():
        texts = inspection.samples(state.denoiser, state.run.algorithm, state.tokenizer, state.run.sample_texts, stop)
    for text in texts:
        log.text(state.step, "sample", text)


def _save(state: State, saving: Saving, *, last: bool) -> None:
    """Save unless a weight is not finite. In mid-run training goes on meanwhile, also if the disk is full."""
    bad = guard.everywhere(guard.bad_weight(state.weights()), state.ranks)
    if bad is None:
        (saving.finish if last else saving.begin)(state.snapshot())
        return
    saving.refuse(bad)
    if last:
        raise guard.diverged(bad, state.step)
