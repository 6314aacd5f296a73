"""The demonstration: train a small Eso-LM (B) on Shakespeare, watch it write and fill gaps, leave a page to open. While
there is none yet, the model that comes along writes first.

Everything it does is a call that a user can make: `prepare`, `train`, `load`, `write`, `report.write`. Run again in the
same folder it goes on from what is there.
"""

import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from esolm import calibrate, checkpoint, exhibits, journal, prepare, recipes, report, sample, shipped
from esolm.algorithms import Algorithm, EsoLM, Request
from esolm.data import Loader
from esolm.denoiser import Denoiser
from esolm.draw import Draw
from esolm.model import Model, load
from esolm.optim import Optimizer, WeightAverage
from esolm.sample import Reveal
from esolm.texts import watching
from esolm.train import Outcome, Run, learn, train

VOCAB_SIZE = 4096
METHOD = EsoLM(variant="B", alpha_0=0.125, batch_split=0.25)  # diffusion writes little, and learns from less
SOURCE = prepare.Source(data="shakespeare")
PROMPT = "KING RICHARD.\nNow is the winter"  # speakers as most of the plays print them
GAP = "HAMLET.\nTo be, or ________, that is the question:\nWhether 'tis nobler in the mind to ________________\n"
_FIRST = shipped.MODELS[0]
_NUM_STEPS, _TEMPERATURE, _TOP_P = 12, 0.7, 0.9  # of the texts shown
_OVERHEAD = 1.06  # of a run over its steps: validation, checkpoints, the journal
_ALLOWED = 1.25  # a run may take this much longer than planned before it is stopped
_TIMED_STEPS, _TIMED_TEXTS = 6, 5
_SPEEDS_NOTE = (
    "One text of {length} tokens at a time, a token a step, medians of {texts}, drawing included, on this network. "
    "MDLM and the diffusion phase of (A) compute the whole text every step; the others keep keys and values. "
    "The longer the text, the wider the gap."
)


def run(
    out: Path,
    *,
    minutes: float = 6.0,
    seed: int = 0,
    console: Console | None = None,
    recipe: Callable[[Algorithm, int], Run] = recipes.demo,
    source: prepare.Source = SOURCE,
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """Train for about `minutes` (or go on with what is in `out`), show, and write `out/report.html`; returns it.

    `recipe` gives the run, whose number of steps is fitted to `minutes`. ValueError for minutes that are not positive;
    KeyboardInterrupt after Ctrl-C: what was learned is saved, and the next call goes on.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    console = console or Console()
    began = time.monotonic()
    folder, again = out / "run", f"esolm demo --out {shlex.quote(str(out))}"
    if not folder.is_dir():
        _say(console, f"First, a model that comes along writes ({_FIRST}); then one of your own is trained")
        ready = load(_FIRST)
        _shown(ready, _request(ready, seed), console, slower=0.02)
    outcome = _trained(folder, source, recipe, vocab_size, minutes=minutes, seed=seed, console=console)
    if outcome is not None and outcome.interrupted:
        _tell(console, f"\nStopped at step {outcome.step:,} and saved. Go on with: {again}")
        raise KeyboardInterrupt
    try:
        page = _show(load(folder), out, seed, console)
    except KeyboardInterrupt:
        _tell(console, f"\nStopped; the trained model is in {folder}. Go on with: {again}")
        raise
    _tell(console, f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.")
    options = f"--prompt 'JULIET.' --temperature {_TEMPERATURE} --top-p {_TOP_P}"
    _tell(console, f"Write more:    esolm sample {shlex.quote(str(folder))} {options}")
    _tell(console, f"Open the page: {page.resolve()}")
    return page


def _trained(
    folder: Path,
    source: prepare.Source,
    recipe: Callable[[Algorithm, int], Run],
    vocab_size: int,
    *,
    minutes: float,
    seed: int,
    console: Console,
) -> Outcome | None:
    """Train in the folder, or go on there; None if it is done already."""
    if folder.is_dir() and checkpoint.newest(folder) is not None:
        settings, found = prepare.resumed(folder)
        if not isinstance(found, prepare.Source):
            raise ValueError(f"the run in {folder} is not a demonstration: choose another folder")
        step = checkpoint.load(folder, optimizer=False).step
        if step >= settings.num_steps:
            _say(console, f"The model in {folder} is trained: it is used again. Remove the folder to train another")
            return None
        _say(console, f"Going on with the run in {folder}, at step {step:,} of {settings.num_steps:,} (Ctrl-C saves)")
        return _train(settings, folder, prepare.prepare(found, folder, console=console), found, console, resume=True)
    (folder / journal.FILE).unlink(missing_ok=True)  # of a run that was killed before it saved anything
    _say(console, "Reading Shakespeare: learning a vocabulary, turning text into tokens")
    text = prepare.prepare(source, folder, vocab_size=vocab_size, console=console)
    _tell(console, f"{text.learned.num_tokens:,} tokens to learn from, {text.held_out.num_tokens:,} held out")
    settings = replace(recipe(METHOD, text.tokenizer.vocab_size), seed=seed)
    seconds = _seconds_a_step(settings, text.training(settings.network.length, seed=seed))
    settings = _fitted(settings, seconds, minutes)
    plan = f"{settings.num_steps:,} steps of {settings.batch_size} texts, about {minutes:g} minutes"
    _say(console, f"Training: {plan} (Ctrl-C saves)")
    return _train(settings, folder, text, source, console, resume=False)


def _train(
    settings: Run, folder: Path, text: prepare.Text, source: prepare.Source, console: Console, *, resume: bool
) -> Outcome:
    return train(
        settings,
        folder,
        tokenizer=text.tokenizer,
        data=text.training(settings.network.length, seed=settings.seed),
        validation=text.validation(settings.network.length),
        resume=resume,
        origin=source.origin(),
        console=console,
    )


def _fitted(settings: Run, seconds: float, minutes: float) -> Run:
    """The run with as many steps, of so many seconds each, as fit into `minutes`. The schedule of the rate is in shares
    of the run, so warm-up and decay keep their shape."""
    steps = max(1, round(60 * minutes / (_OVERHEAD * seconds)))
    often = max(1, steps // 8)
    return replace(
        settings,
        num_steps=steps,
        minutes=_ALLOWED * minutes,
        log_every=max(1, steps // 150),
        validate_every=often,
        save_every=often,
    )


def _seconds_a_step(settings: Run, data: Loader) -> float:
    """Median time of an update, of a network that is thrown away; the first ones warm up."""
    network = Denoiser(settings.network, torch.Generator().manual_seed(0))
    optimizer, average = Optimizer(network, settings.optim), WeightAverage(network)
    bf16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and calibrate.bf16_pays(torch.device("cpu")))
    times = []
    for step in range(_TIMED_STEPS + 1):
        began = time.monotonic()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            learn(settings, network, data.batch(step, 0, settings.batch_size, settings.batch_size), step)
        optimizer.clip()
        optimizer.update(settings.optim.schedule.rate(step, settings.num_steps))
        average.update(step + 1)
        times.append(time.monotonic() - began)
    return statistics.median(times[1:])


def _show(model: Model, out: Path, seed: int, console: Console) -> Path:
    """Write before the reader's eyes, time the methods, and leave the page, and its first text as a picture."""
    _say(console, "A text written in two phases: diffusion first, in any order; then the rest, left to right")
    written = _shown(model, _request(model, seed), console, slower=0.04)
    _say(console, "Two gaps filled, with what stands on both sides in view")
    gaps = model.gaps(GAP, seed=seed, num_steps=4, temperature=_TEMPERATURE, top_p=_TOP_P)
    filled = _shown(model, gaps, console, slower=0.12)
    _say(console, "Speed of the five methods on this network")
    speeds = _speeds(model, console)
    _say(console, "Two more texts, and the page")
    more = model.complete([replace(_request(model, seed), seed=seed + number) for number in (1, 2)])
    page = out / "report.html"
    shown = _report(out / "run", model, (written, filled), speeds, more)
    report.write(shown, page)
    (out / "writing.svg").write_text(_stills(shown.replays[0]), encoding="utf-8")
    return page


def _request(model: Model, seed: int) -> Request:
    return model.request(prompt=PROMPT, seed=seed, num_steps=_NUM_STEPS, temperature=_TEMPERATURE, top_p=_TOP_P)


def _shown(model: Model, request: Request, console: Console, *, slower: float) -> tuple[Request, list[Reveal]]:
    """Write a text before the reader's eyes; returns what was revealed."""
    reveals = []
    with watching(model, request, live=True, console=console, slower=slower if console.is_terminal else 0.0) as view:
        for reveal in model.write([request]):
            view.reveal(reveal)
            reveals.append(reveal)
    return request, reveals


def _speeds(model: Model, console: Console) -> tuple[report.Speed, ...]:
    """Median time of a text of each method, one at a time, through the sampler that users run. Weights do not change a
    speed, so the same network serves all."""
    timed: dict[str, list[float]] = {name: [] for name in recipes.METHODS}
    nfe = dict.fromkeys(timed, 0)
    turns = [(name, turn) for turn in range(_TIMED_TEXTS + 1) for name in timed]
    for name, turn in track(turns, description="timing", console=console, transient=True):
        request = Request(length=model.length, seed=turn, stop_at_end=False, draw=Draw(temperature=1.0))
        began = time.perf_counter()
        (done,) = sample.complete(model.writer, recipes.method(name), [request])
        if turn:  # the first warms up
            timed[name].append(time.perf_counter() - began)
            nfe[name] = done.nfe
    rows = []
    for name, times in timed.items():
        middle = statistics.median(times)
        row = report.Speed(
            model=exhibits.NAMES[name], seconds=middle, tokens_per_second=model.length / middle, nfe=nfe[name]
        )
        rows.append(row)
        _tell(console, f"  {row.model:10} {row.tokens_per_second:8,.0f} tokens/s")
    return tuple(rows)


def _report(
    folder: Path,
    model: Model,
    shown: tuple[tuple[Request, list[Reveal]], ...],
    speeds: tuple[report.Speed, ...],
    more: list[sample.Written],
) -> report.Report:
    titles = (
        (
            "A text, written in two phases",
            "Drag the slider, or press Play. Diffusion writes a share of the tokens, many at once; then the rest is "
            "filled in from left to right, reading everything that is there, before it and after it.",
        ),
        ("Gaps, filled", "The given words stand fast. The model sees both sides of each gap."),
    )
    replays = (exhibits.replay(model, *words, *text) for words, text in zip(titles, shown, strict=True))
    machine = f"{calibrate.capability()}, {torch.get_num_threads()} threads"
    return report.Report(
        title="esolm: a small model of Shakespeare",
        intro="An Eso-LM (B) trained on this machine: a language model between diffusion and autoregression.",
        facts=(*model.info().items(), ("machine", machine)),
        replays=tuple(replays),
        curves=tuple(exhibits.curves(journal.read(folder))),
        speeds=speeds,
        speeds_note=_SPEEDS_NOTE.format(length=model.length, texts=_TIMED_TEXTS),
        pictures=tuple(exhibits.pictures()),
        samples=tuple(model.tokenizer.decode(text.tokens.tolist()) for text in more),
    )


def _stills(replay: report.Replay) -> str:
    """The text at four stages: half of diffusion, all of it, half of the rest, all."""
    by_diffusion, steps = sum(step.phase == "diffusion" for step in replay.steps), len(replay.steps)
    return report.stills(replay, (by_diffusion // 2, by_diffusion, (by_diffusion + steps) // 2, steps))


def _say(console: Console, words: str) -> None:
    console.print(f"\n[bold]{words}[/]", highlight=False)


def _tell(console: Console, words: str) -> None:
    console.print(words, highlight=False, markup=False, soft_wrap=True)
