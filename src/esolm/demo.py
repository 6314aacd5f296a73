"""The demonstration: train a small Eso-LM (B) on Shakespeare, watch it write and fill a gap, leave a page to open.

Everything it does is a call that a user can make: `prepare`, `train`, `load`, `write`, `report.write`. Run again in the
same folder it goes on from what is there.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from esolm import attention, calibrate, checkpoint, journal, plain, prepare, recipes, report, sample
from esolm.algorithms import Algorithm, Request, View
from esolm.algorithms.algorithm import Batch
from esolm.data import Loader
from esolm.denoiser import Denoiser
from esolm.draw import Draw
from esolm.model import Model, load
from esolm.noise import Noise
from esolm.sample import Reveal
from esolm.texts import watching
from esolm.train import Outcome, Run, learn, train

VOCAB_SIZE = 2048
ALPHA_0 = 0.125
PROMPT = "ROMEO:\n"
GAP = "HAMLET:\nTo be, or ________, that is the question:\nWhether 'tis nobler in the mind to ________________\n"
_NUM_STEPS, _TEMPERATURE = 12, 0.8  # of the texts shown
_OVERHEAD = 1.1  # of a run over its steps: validation, checkpoints
_ALLOWED = 1.3  # a run may take this much longer than planned before it is stopped
_TIMED_TEXTS = 5
_SPEEDS_NOTE = (
    "One text of {length} tokens at a time, a token a step, medians of {texts}, drawing included, on this network. "
    "MDLM and the diffusion phase of (A) compute the whole text every step; the others keep keys and values. "
    "The longer the text, the wider the gap."
)


def run(out: Path, *, minutes: float = 6.0, seed: int = 0, console: Console | None = None) -> Path:
    """Train for about `minutes` (or go on with what is in `out`), show, and write `out/report.html`; returns it.

    KeyboardInterrupt after Ctrl-C; what was learned is saved and the next call goes on.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    console = console or Console()
    began = time.monotonic()
    _say(console, "Reading Shakespeare")
    text = prepare.prepare(
        prepare.Source(data="shakespeare", seed=seed), out / "run", vocab_size=VOCAB_SIZE, console=console
    )
    console.print(f"{text.learned.num_tokens:,} tokens to learn from, {text.held_out.num_tokens:,} held out")
    outcome = _trained(out / "run", text, minutes, seed, console)
    if outcome is not None and outcome.interrupted:
        console.print(f"Stopped at step {outcome.step:,} and saved; run it again to go on.")
        raise KeyboardInterrupt
    model = load(out / "run")
    _say(console, "A text written in two phases: diffusion first, in any order; then the rest, left to right")
    written = _shown(model, _request(model, seed), console, slower=0.04)
    _say(console, "Two gaps filled, with what stands on both sides in view")
    gap = model.gaps(GAP, seed=seed, num_steps=4, temperature=_TEMPERATURE)
    filled = _shown(model, gap, console, slower=0.12)
    _say(console, "Speed of the five methods on this network")
    speeds = _speeds(model, console)
    page = out / "report.html"
    report.write(_report(out / "run", model, (written, filled), speeds, seed), page)
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open [bold]{page}[/] in a browser.")
    console.print(f"Write more with: esolm sample {out / 'run'} --prompt 'JULIET:' --temperature 0.8", highlight=False)
    return page


def _trained(folder: Path, text: prepare.Text, minutes: float, seed: int, console: Console) -> Outcome | None:
    """Train in the folder, or go on there; None if it is done already."""
    newest = checkpoint.newest(folder)
    if newest is not None:
        settings, _ = prepare.resumed(folder)
        if checkpoint.load(newest, optimizer=False).step == settings.num_steps:
            console.print(f"Found a trained model in {folder}; remove it to train another.")
            return None
    else:
        settings = replace(recipes.demo(recipes.method("esolm-b", ALPHA_0), text.tokenizer.vocab_size), seed=seed)
        settings = _fitted(settings, text.training(settings.network.length, seed=seed), minutes)
        plan = f"{settings.num_steps:,} steps of {settings.batch_size} texts, about {minutes:g} minutes"
        _say(console, f"Training {plan} (Ctrl-C saves)")
    return train(
        settings,
        folder,
        tokenizer=text.tokenizer,
        data=text.training(settings.network.length, seed=settings.seed),
        validation=text.validation(settings.network.length),
        resume=newest is not None,
        origin=prepare.Source(data="shakespeare", seed=seed).origin(),
        console=console,
    )


def _fitted(settings: Run, data: Loader, minutes: float) -> Run:
    """The run with as many steps as fit into `minutes` on this machine, measured on a few."""
    network = Denoiser(settings.network, torch.Generator().manual_seed(0))
    bf16 = calibrate.bf16_pays(torch.device("cpu"))
    times = []
    for step in range(5):
        began = time.monotonic()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            learn(settings, network, data.batch(step, 0, settings.batch_size, settings.batch_size), step)
        times.append(time.monotonic() - began)
    steps = max(20, round(60 * minutes / (_OVERHEAD * statistics.median(times[1:]))))
    return replace(
        settings,
        num_steps=steps,
        minutes=_ALLOWED * minutes,
        validate_every=max(1, steps // 5),
        save_every=max(1, steps // 5),
    )


def _request(model: Model, seed: int) -> Request:
    return model.request(prompt=PROMPT, seed=seed, num_steps=_NUM_STEPS, temperature=_TEMPERATURE)


def _shown(model: Model, request: Request, console: Console, *, slower: float) -> tuple[Request, list[Reveal]]:
    """Write a text before the reader's eyes; returns what was revealed."""
    reveals = []
    with watching(model, request, live=True, console=console, slower=slower if console.is_terminal else 0.0) as watch:
        for reveal in model.write([request]):
            watch.reveal(reveal)
            reveals.append(reveal)
    return request, reveals


def _speeds(model: Model, console: Console) -> tuple[report.Speed, ...]:
    """Median time of a text of each method, one at a time, through the sampler that users run. Weights do not change a
    speed, so the same network serves all."""
    length = model.length
    timed: dict[str, list[float]] = {name: [] for name in recipes.METHODS}
    nfe = dict.fromkeys(timed, 0)
    turns = [(name, turn) for turn in range(_TIMED_TEXTS + 1) for name in timed]
    for name, turn in track(turns, description="timing", console=console, transient=True):
        request = Request(length=length, seed=turn, stop_at_end=False, draw=Draw(temperature=1.0))
        began = time.perf_counter()
        (done,) = sample.complete(model.writer, recipes.method(name), [request])
        if turn:  # the first warms up
            timed[name].append(time.perf_counter() - began)
            nfe[name] = done.nfe
    rows = []
    for name, times in timed.items():
        middle = statistics.median(times)
        rows.append(report.Speed(model=name, seconds=middle, tokens_per_second=length / middle, nfe=nfe[name]))
        console.print(f"  {name:8} {length / middle:8,.0f} tokens/s", highlight=False)
    return tuple(rows)


def _report(
    folder: Path,
    model: Model,
    shown: tuple[tuple[Request, list[Reveal]], ...],
    speeds: tuple[report.Speed, ...],
    seed: int,
) -> report.Report:
    entries = journal.read(folder)
    titles = (
        (
            "A text, written in two phases",
            "Drag the slider, or press play. Diffusion writes a share of the tokens, many at once; then the rest is "
            "filled in from left to right, reading everything that is there, left and right.",
        ),
        ("Gaps, filled", "The given words stand fast. The model sees both sides of each gap."),
    )
    replays = tuple(_replay(model, *words, *text) for words, text in zip(titles, shown, strict=True))
    more = [replace(_request(model, seed), seed=seed + number) for number in (1, 2)]
    length, threads = model.length, torch.get_num_threads()
    return report.Report(
        title="esolm: a small model of Shakespeare",
        intro="An Eso-LM (B) trained on this machine: a language model between diffusion and autoregression.",
        facts=(*model.info().items(), ("machine", f"{calibrate.capability()}, {threads} threads")),
        replays=replays,
        curves=tuple(_curves(entries)),
        speeds=speeds,
        speeds_note=_SPEEDS_NOTE.format(length=length, texts=_TIMED_TEXTS),
        pictures=tuple(_pictures()),
        samples=tuple(model.tokenizer.decode(text.tokens.tolist()) for text in model.complete(more)),
    )


def _replay(model: Model, title: str, caption: str, request: Request, reveals: list[Reveal]) -> report.Replay:
    tokens = dict(request.given)
    for reveal in reveals:
        tokens.update(zip(reveal.positions, reveal.tokens, strict=True))
    end_id = model.tokenizer.end_id
    pieces = [model.tokenizer.decode([tokens.get(p, end_id)]) for p in range(request.length)]
    ends = (p for p in range(request.length) if tokens.get(p, end_id) == end_id and p not in request.given)
    return report.replay_of(title, caption, pieces, reveals, end=next(ends, request.length))


def _curves(entries: list[dict[str, object]]) -> Iterator[report.Curve]:
    for name, keys in (("training", ("loss",)), ("validation", ("validation", "validation_error"))):
        points = [
            (float(entry["step"]), *(float(entry[key]) for key in keys))  # type: ignore[arg-type]
            for entry in entries
            if keys[0] in entry
        ]
        if points:
            yield report.Curve(name=name, points=tuple(points))


def _pictures() -> Iterator[report.Picture]:
    """The rule, drawn for a text of eight tokens as each method sees it in training."""
    batch = Batch.of(torch.zeros(1, 8, dtype=torch.int64))
    noise = Noise(seed=3, step=0, start=0, stop=1, total=1)
    for name in recipes.METHODS:
        algorithm: Algorithm = recipes.method(
            name, alpha_0=0.5 if name.startswith("esolm") else None, block_size=4 if name == "bd3lm" else None
        )
        for view in algorithm.bound(batch, noise, mask_id=1):
            yield _picture(algorithm, view)


def _picture(algorithm: Algorithm, view: View) -> report.Picture:
    rows = attention.picture(view.stage[0], view.public[0]).split("\n")
    masks = int((view.tokens[0] == 1).sum())
    kind = plain.to_plain(algorithm).get("variant", "")
    name = f"{type(algorithm).__name__} {f'({kind})' if kind else ''}".strip()
    return report.Picture(name=name, caption=f"{view.term}: {len(rows)} rows, {masks} of them masks", rows=tuple(rows))


def _say(console: Console, words: str) -> None:
    console.print(f"\n[bold]{words}[/]", highlight=False)
