"""Quality against time: what each model writes at each setting, how long that takes, and what a judge says of it.

    Setting(alpha_0, num_steps)  ->  texts, seconds a text, network evaluations  ->  perplexity, entropy, MAUVE

Seconds are of whole texts, drawing included, `batch` written together, medians over batches; a first batch warms up.
All texts are of full length. Texts and times are kept under a key that has the weights, the setting and the machine, so
that an interrupted run goes on, and a point is never mixed from two machines.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from esolm import curves, plain, quality
from esolm import judge as judges
from esolm.algorithms import AR, BD3LM, EsoLM
from esolm.inference import describe
from esolm.judge import Judge, Quality
from esolm.model import Model, seed_of
from esolm.order import Interleaved, Uniform
from esolm.records import Records
from esolm.tables import ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_ENTROPY = 0.5  # nats that the axis of entropies spans


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How texts are written: the share of diffusion (None: as trained), its steps (None: a token a step; for BD3-LM of
    each block), and how tokens are drawn."""

    alpha_0: float | None = None
    num_steps: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model at one setting."""

    model: str
    method: str
    setting: Setting
    length: int
    batch: int
    num: int
    seed: int
    nfe: float  # network evaluations a text, on average
    seconds: float  # a text, of a batch written together: the median over batches
    machine: str
    quality: Quality

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        return {**asdict(self), "quality": self.quality.values()}


def settings_of(
    model: Model, alphas: Sequence[float | None], steps: Sequence[int | None], **drawing: Any
) -> list[Setting]:
    """The settings that a model has of a grid: AR one, MDLM and BD3-LM the steps, Eso-LM both."""
    algorithm = model.algorithm
    if isinstance(algorithm, AR):
        return [Setting(**drawing)]
    if isinstance(algorithm, EsoLM):
        sequential = [a for a in alphas if (algorithm.alpha_0 if a is None else a) == 0]  # no diffusion steps to choose
        return [
            Setting(alpha_0=a, num_steps=t, **drawing) for a in alphas for t in ([None] if a in sequential else steps)
        ]
    if isinstance(algorithm, BD3LM):
        blocks = model.length // algorithm.block_size
        per_block = dict.fromkeys(None if t is None else max(1, t // blocks) for t in steps)
        return [Setting(num_steps=t, **drawing) for t in per_block]
    return [Setting(num_steps=t, **drawing) for t in steps]


def measure(
    model: Model,
    setting: Setting,
    judge: Judge,
    *,
    name: str,
    folder: Path,
    num: int = 64,
    batch: int = 8,
    real: Sequence[str] | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Point:
    """Write `num` texts, `batch` together, and have them judged; with `real` texts, MAUVE too. `folder` keeps all.
    ValueError, before anything is written, where MAUVE cannot be had."""
    if min(num, batch) < 1:
        raise ValueError(f"num and batch must be at least 1, got {num} and {batch}")
    if real is not None:
        quality.refuse_mauve(num, num)
    entries = _written(model, setting, name, folder, num, batch, seed, console)
    texts = [text for entry in entries for text in entry["texts"]]
    against = None if real is None else quality.pieces(real, texts)
    return Point(
        model=name,
        method=repr(model.algorithm),
        setting=setting,
        length=model.length,
        batch=batch,
        num=num,
        seed=seed,
        nfe=statistics.fmean(nfe for entry in entries for nfe in entry["nfe"]),
        seconds=statistics.median(entry["seconds"] / len(entry["texts"]) for entry in entries),
        machine=_machine(model),
        quality=judges.measured(
            judge,
            texts,
            name=name,
            drawn={"seed": seed, "top_p": setting.top_p, "temperature": setting.temperature},
            real=against,
            seed=seed,
            folder=folder,
            console=console,
        ),
    )


def table(points: Sequence[Point]) -> Table:
    """The points for the terminal, fastest first within a model."""
    shown = ruled("quality against time")
    for label in ("model", "alpha_0", "steps", "NFE", "s/text", "perplexity", "entropy", "MAUVE"):
        shown.add_column(label, justify="left" if label == "model" else "right", overflow="fold")
    for point in points:
        shown.add_row(*_cells(point))
    return shown


def markdown(points: Sequence[Point]) -> str:
    """The points as a table in Markdown."""
    head = ("model", "alpha_0", "steps", "NFE", "s/text", "perplexity", "entropy", "MAUVE")
    lines = [head, ("---",) * len(head), *map(_cells, points)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def best(points: Sequence[Point]) -> list[Point]:
    """The Pareto frontier, fastest first: no other point is as fast and has a lower perplexity. A collapsed text may
    have one, too: look at its entropy."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.seconds, point.quality.perplexity)):
        if not found or point.quality.perplexity < found[-1].quality.perplexity:
            found.append(point)
    return found


def draw(points: Sequence[Point], path: Path) -> None:
    """Perplexity and entropy against seconds a text, a line for each model, points labelled with their evaluations; the
    frontier is ringed. Needs matplotlib (the extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(point.model for point in points)):
        line = sorted((point for point in points if point.model == name), key=lambda point: point.nfe)
        seconds, look = [point.seconds for point in line], _look(number)
        left.plot(seconds, [point.quality.perplexity for point in line], label=name, **look)
        right.plot(seconds, [point.quality.entropy for point in line], **look)
    for point in best(points):
        left.plot(point.seconds, point.quality.perplexity, "o", markersize=12, fillstyle="none", color="0.4")
    perplexities, entropies = [[getattr(p.quality, name) for p in points] for name in ("perplexity", "entropy")]
    curves.plain_log(left, perplexities)
    room = max(0.02, (_LEAST_ENTROPY - (max(entropies) - min(entropies))) / 2)  # noise must not look like a difference
    right.set_ylim(min(entropies) - room, max(entropies) + room)
    labels = ("generative perplexity (lower is better)", "entropy, nats (low: collapsed)")
    for axes, values, label in zip((left, right), (perplexities, entropies), labels, strict=True):
        curves.plain_log(axes, [point.seconds for point in points], "x")
        axes.set_xlabel("seconds a text (labels: network evaluations)")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, points, values)
    first = points[0]
    figure.suptitle(
        f"{first.num} texts of {first.length} tokens, batch {first.batch}, top-p {first.setting.top_p:g}, judge "
        f"{first.quality.facts['judge']}; rings: the frontier\n{first.machine}",
        fontsize=9,
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def keep(points: Sequence[Point], folder: Path) -> None:
    """Write `frontier.md` and `frontier.json`."""
    (folder / "frontier.md").write_text(markdown(points), encoding="utf-8")
    (folder / "frontier.json").write_text(plain.render([point.values() for point in points]), encoding="utf-8")


def _cells(point: Point) -> tuple[str, ...]:
    setting, found = point.setting, point.quality
    return (
        point.model,
        "-" if setting.alpha_0 is None else f"{setting.alpha_0:g}",
        "-" if setting.num_steps is None else f"{setting.num_steps}",
        f"{point.nfe:.1f}",
        f"{point.seconds:.3f}",
        f"{found.perplexity:.1f}",
        f"{found.entropy:.2f}",
        "-" if found.mauve is None else f"{found.mauve:.3f}",
    )


def _label(axes: "Axes", points: Sequence[Point], values: Sequence[float]) -> None:
    """Evaluations beside each point, where they do not lie on a label that is there already."""
    taken: list[tuple[float, float]] = []
    for point, value in zip(points, values, strict=True):
        x, y = axes.transData.transform((point.seconds, value))
        if all(abs(x - other) > 24 or abs(y - beside) > 10 for other, beside in taken):
            taken.append((x, y))
            at = (point.seconds, value)
            axes.annotate(f"{point.nfe:.0f}", at, (3, 3), textcoords="offset points", fontsize=7)


def _look(number: int) -> dict[str, Any]:
    """Of a model's line: the eleventh has the first one's colour and another marker."""
    return {"color": f"C{number % 10}", "marker": "osD^vP*X<>hp8"[number % 13], "markersize": 5, "linewidth": 1}


def _written(
    model: Model,
    setting: Setting,
    name: str,
    folder: Path,
    num: int,
    batch: int,
    seed: int,
    console: Console | None,
) -> list[dict[str, Any]]:
    """Batches of texts with their seconds; those that the folder has are not written again."""
    options = asdict(setting)
    interleaved = options.pop("interleaved")
    first = replace(model.request(positions=Interleaved() if interleaved else Uniform(), **options), stop_at_end=False)
    requests = [replace(first, seed=seed_of(seed, number)) for number in range(num)]
    parts = [requests[at : at + batch] for at in range(0, num, batch)]
    key: Mapping[str, Any] = {
        "weights": model.digest,
        "setting": asdict(setting),
        "machine": _machine(model),
        "num": num,
        "batch": batch,
        "seed": seed,
    }
    with Records(folder, "written", key) as records, Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"{name} · {_told(setting)}", total=len(parts), completed=len(records.entries))
        if len(records.entries) < len(parts):
            model.complete(parts[0])  # warms up
        for part in parts[len(records.entries) :]:
            began = time.perf_counter()
            written = model.complete(part)
            seconds = time.perf_counter() - began
            texts = [model.tokenizer.decode(text.tokens.tolist()) for text in written]
            records.add({"texts": texts, "nfe": [text.nfe for text in written], "seconds": seconds})
            bar.advance(task)
        return records.entries


def _told(setting: Setting) -> str:
    default = Setting()
    changed = {name: value for name, value in asdict(setting).items() if value != getattr(default, name)}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "as trained"


def _machine(model: Model) -> str:
    return f"{describe(model.writer)}, torch {torch.__version__}"
