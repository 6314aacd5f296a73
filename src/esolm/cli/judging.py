"""`esolm judge`, `esolm frontier` and `esolm family`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.parsing import DtypeName, Flag, Maybe
from esolm.cli.terminal import bars, console, device_of, loaded, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from esolm.frontier import Point, Setting
    from esolm.judge import Quality
    from esolm.model import Model

Folder = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FOLDER")]


def judge(
    texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")],
    by: str = "smollm2",
    real: Maybe[str] = None,
    field: str = "text",
    length: int = 1024,
    seed: int = 0,
    out: Folder = None,
    device: str = "auto",
    plot: Maybe[Path] = None,
    json: Flag = False,
) -> None:
    """Quality of written texts: perplexity under a judge, entropy, distinct runs, repetition and MAUVE.

    Examples:

      esolm sample runs/first --num 200 --output texts.jsonl
      esolm judge texts.jsonl --real held-out.txt
      esolm judge texts.jsonl --by runs/ar --out results/judged
      esolm judge first.jsonl second.jsonl --by runs/ar --plot qualities.png

    In Python:

      from esolm.judge import judge_of, measured

      quality = measured(judge_of("runs/ar"), list(corpus.documents("texts.jsonl")))

    Args:
        texts: Files of texts, as `esolm sample --output` writes them, or any that `esolm train` reads.
        by: The judge: smollm2, a causal model of transformers (hub id, folder, GGUF file), or a run of our AR.
        real: Real text to compare with, for MAUVE and for a line of its own.
        field: Field of the text in JSON lines, Parquet or a data set.
        length: Most tokens that a judge of transformers reads at once.
        seed: Of the bootstrap and of MAUVE.
        out: Folder that keeps each score as it comes (an interrupted call goes on), and table.md and table.json,
            written anew after each file, but not in place of a longer one before the last.
        device: auto, cpu, cuda, cuda:1, ...
        plot: Also draw perplexity against entropy, a point for each file, into this file (needs the extra plot).
        json: Print JSON lines instead of a table.
    """
    from esolm import charts, corpus
    from esolm.judge import judge_of, keep, measured, table
    from esolm.records import refuse_other_table

    if not texts:
        raise ValueError("give at least one file of texts: esolm judge FILE")
    _refuse_picture(plot)
    if out is not None:
        refuse_other_table(out, "entropy")
    jobs = _jobs({str(path): list(corpus.documents(path, field=field)) for path in texts}, real, field)
    by_whom = judge_of(by, length=length, device=device_of(device))
    how: dict[str, Any] = {"seed": seed, "folder": out, "console": bars()}
    rows: list[Quality] = []
    for name, found, more in jobs:
        rows.append(measured(by_whom, found, name=name, **more, **how))
        if out is not None:
            keep(rows, out, done=len(rows) == len(jobs))
    if plot is not None:
        charts.qualities(rows, plot)
    _print(rows, table(rows), json)


def _jobs(written: dict[str, list[str]], real: str | None, field: str) -> "list[tuple[str, list[str], dict[str, Any]]]":
    """Name, texts and what else is known of each file, and of real text. What MAUVE lacks is told here."""
    from esolm import corpus, prepare, quality
    from esolm.judge import REAL_TEXT
    from esolm.texts import drawing_of

    known = None if real is None else list(corpus.documents(prepare.located(real), field=field))
    against = {name: None if known is None else quality.pieces(known, found) for name, found in written.items()}
    for name, pieces in against.items():
        if pieces is not None:
            quality.refuse_mauve(len(written[name]), len(pieces))
    jobs: list[tuple[str, list[str], dict[str, Any]]]
    jobs = [(name, found, {"real": against[name], "drawn": drawing_of(name)}) for name, found in written.items()]
    if real is not None:
        by_nobody = dict.fromkeys(("seed", "top_p", "temperature"), REAL_TEXT)
        jobs += [(real, part, {"drawn": by_nobody}) for part in list(against.values())[:1] if part is not None]
    return jobs


def _refuse_picture(plot: Path | None) -> None:
    from esolm.bench.plot import check

    if plot is not None:
        check(plot)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is written."""

    alpha_0: Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Eso-LM: shares that diffusion writes; left out, as trained."""
    num_steps: tuple[int, ...] = (4, 8, 16, 32, 64, 0)
    """Diffusion steps of a text (BD3-LM: its blocks share them); 0 is one token a step."""
    num: int = 64
    """Texts of each point."""
    batch: int = 8
    """Texts written together."""
    temperature: float = 1.0
    """Of the draws."""
    top_p: float = 0.9
    """Of the draws."""
    interleaved: Flag = False
    """Diffusion steps take evenly spread positions."""
    seed: int = 0
    """Of the texts."""

    def settings(self, model: "Model") -> "list[Setting]":
        """Those that a model has."""
        from esolm.frontier import settings_of

        steps = [number or None for number in self.num_steps]
        drawing = {"temperature": self.temperature, "top_p": self.top_p, "interleaved": self.interleaved}
        return settings_of(model, self.alpha_0 or (None,), steps, **drawing)


_GRID = Grid()


def frontier(
    checkpoints: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="CHECKPOINT ...", help_behavior_hint="")
    ],
    out: Path,
    grid: Annotated[Grid, tyro.conf.arg(name="")] = _GRID,
    by: str = "smollm2",
    real: Maybe[str] = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    plot: Maybe[Path] = None,
    json: Flag = False,
) -> None:
    """Quality against time: texts of models at several settings, their seconds, and what a judge says of them.

    Examples:

      esolm frontier runs/ar runs/mdlm runs/esolm --out results/all --by runs/ar --plot frontier.png
      esolm frontier runs/esolm --out results/alphas --alpha-0 0.125 0.5 1 --num-steps 8 32 --real held-out.txt

    In Python:

      from esolm.frontier import Setting, measure
      from esolm.judge import judge_of

      model, by = esolm.load("runs/first"), judge_of("runs/ar")
      point = measure(model, Setting(num_steps=8), by, name="first", folder=Path("results"), num=4)

    Args:
        checkpoints: Runs' folders or single steps.
        out: Folder that keeps all texts and scores (an interrupted call goes on), frontier.md and frontier.json.
        grid: What is written.
        by: The judge: smollm2, a causal model of transformers (hub id, folder, GGUF file), or a run of our AR.
        real: Real text to compare with, for MAUVE.
        dtype: Of the network's weights; auto asks the CPU.
        device: auto, cpu, cuda, cuda:1, ...
        plot: Also draw quality and entropy against time into this file (needs the extra plot).
        json: Print JSON lines instead of a table.
    """
    from esolm import corpus, prepare, quality
    from esolm.frontier import draw, keep, measure, table
    from esolm.judge import judge_of

    if not checkpoints:
        raise ValueError("give at least one checkpoint: esolm frontier CHECKPOINT --out FOLDER")
    _refuse_picture(plot)
    if real is not None:
        quality.refuse_mauve(grid.num, grid.num)
    by_whom = judge_of(by, device=device_of(device))
    how: dict[str, Any] = {"folder": out, "num": grid.num, "batch": grid.batch, "seed": grid.seed, "console": bars()}
    how["real"] = None if real is None else list(corpus.documents(prepare.located(real)))
    points: list[Point] = []
    for path in checkpoints:
        model = loaded(path, dtype, device)
        for setting in grid.settings(model):
            points.append(measure(model, setting, by_whom, name=path.name, **how))
            keep(points, out)
    if plot is not None:
        draw(points, plot)
    _print(points, table(points), json)


def family(out: Path = Path("runs/family"), workers: int = 2, vocab_size: int = 2048) -> None:
    """Train the models that docs/results.md compares: equal tokens, equal size, one text. The same call goes on.

    Examples:

      esolm family
      esolm family --out runs/family --workers 8

    In Python:

      from esolm import family

      family.train(Path("runs/family"), workers=2)

    Args:
        out: Folder of the runs.
        workers: Models trained at a time; they share the processor's threads.
        vocab_size: Ids of the tokenizer that all share.
    """
    from esolm.family import train

    train(out, workers=workers, vocab_size=vocab_size, console=bars())
    say(f"trained; measure them: esolm evaluate {out}/* --samples 4 --out results")


def _print(rows: "Sequence[Point | Quality]", shown: "Table", json: bool) -> None:
    for row in rows if json else ():
        print_json(row.values())
    if not json:
        console(stderr=False).print(shown)
