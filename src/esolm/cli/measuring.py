"""`esolm evaluate`, `esolm info`, `esolm verify` and `esolm demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.parsing import Checkpoint, DtypeName, Flag, Maybe
from esolm.cli.terminal import bars, console, loaded, print_json, refuse_unwritable, say

if TYPE_CHECKING:
    from esolm.evaluate import Row
    from esolm.model import Model


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How texts are scored."""

    samples: int = 4
    """Draws of the NELBO for each text."""
    orders: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K ...", help_behavior_hint="")] = ()
    """Also the importance-weighted bound of so many orders (Eso-LM)."""
    texts: int = 256
    """At most this many windows of text; 0 is all of them."""
    context: int = 0
    """Tokens that a window reads of the one before it; they are not scored twice."""
    seed: int = 0
    """Of the draws."""


_SCORING = Scoring()


def evaluate(
    checkpoints: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="CHECKPOINT ...", help_behavior_hint="")
    ],
    data: Maybe[str] = None,
    field: str = "text",
    scoring: Scoring = _SCORING,
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FOLDER")] = None,
    dtype: Maybe[DtypeName] = None,
    device: str = "auto",
    plot: Maybe[Path] = None,
    json: Flag = False,
) -> None:
    """Likelihoods of a text under models, on one scale: nats a token, bits a byte, perplexity.

    Examples:

      esolm evaluate runs/first
      esolm evaluate runs/ar runs/mdlm runs/esolm --data held-out.txt --orders 1 10 100
      esolm evaluate runs/first --texts 0 --context 64 --out results/first
      esolm evaluate runs/first --dtype int8
      esolm evaluate runs/family/* --plot likelihoods.png

    In Python:

      from esolm.evaluate import evaluate

      documents = list(corpus.documents("held-out.txt"))
      rows = evaluate(esolm.load("runs/first", dtype="float32"), documents, samples=4, texts=256)

    Args:
        checkpoints: Runs' folders or single steps.
        data: A text file, a folder, JSON lines, Parquet, hf:NAME; left out, what each run held out of its own text.
        field: Field of the text in JSON lines, Parquet or a data set.
        scoring: How texts are scored.
        out: Folder that keeps each score as it comes (an interrupted evaluation goes on), and table.md and table.json,
            written anew after each checkpoint, but not in place of a longer one before the last.
        dtype: Score with the products that write in this dtype; left out, exactly, in float32.
        device: auto, cpu, cuda, cuda:1, ...
        plot: Also draw the rows with their errors, and Eso-LMs against alpha_0, into this file (needs the extra plot).
        json: Print JSON lines instead of a table.
    """
    from esolm import corpus, prepare
    from esolm.evaluate import evaluate as measure
    from esolm.evaluate import keep

    if not checkpoints:
        raise ValueError("give at least one checkpoint: esolm evaluate CHECKPOINT --data FILE")
    _refuse(plot, out)
    given = None if data is None else list(corpus.documents(prepare.located(data), field=field))
    how = {**vars(scoring), "texts": scoring.texts or None, "scores": None if out is None else out / "scores"}
    rows = []
    for number, path in enumerate(checkpoints, start=1):
        documents = prepare.held_out(path) if given is None else given
        model = loaded(path, dtype or "float32", device)
        name = str(path) if dtype is None else f"{path} in {dtype}"
        rows += measure(model, documents, name=name, as_written=dtype is not None, console=bars(), **how)
        if out is not None:
            keep(rows, out, done=number == len(checkpoints))
    _show(rows, plot, json)


def _refuse(plot: Path | None, out: Path | None) -> None:
    """A picture or a table that cannot be made is told before any work."""
    from esolm.bench.plot import check
    from esolm.records import refuse_other_table

    if plot is not None:
        check(plot)
    if out is not None:
        refuse_other_table(out, "kind")


def _show(rows: "list[Row]", plot: Path | None, json: bool) -> None:
    from esolm import charts
    from esolm.evaluate import table

    if plot is not None:
        charts.likelihoods(rows, plot)
    if json:
        for row in rows:
            print_json(row.values())
    else:
        console(stderr=False).print(table(rows))


def info(checkpoint: Checkpoint, json: Flag = False) -> None:
    """What a checkpoint is: method, size, what it learned from and how, and what its products run on here.

    Examples:

      esolm info runs/first
      esolm info runs/first --json

    In Python:

      esolm.load("runs/first").info()

    Args:
        checkpoint: A run's folder or one step of it.
        json: Print all that the checkpoint records, as JSON.
    """
    model = loaded(checkpoint, "auto", "cpu")
    if json:
        print_json(_recorded(model))
        return
    told = model.info()
    width = max(map(len, told))
    for label, value in told.items():
        print(f"{label:<{width}}  {value}")


def verify(checkpoint: Checkpoint) -> None:
    """Check a checkpoint, every checkpoint of a run, or the tokens in its data folder, byte for byte.

    Examples:

      esolm verify runs/first
      esolm verify runs/first/step-000003000
      esolm verify runs/first/data

    In Python:

      for step in sorted(Path("runs/first").glob("step-*")):
          checkpoint.verify(step)
      shards.TokenData.open(Path("runs/first/data"), digests=True)

    Args:
        checkpoint: A run's folder, one step of it, or its folder of tokens.
    """
    from esolm import checkpoint as checkpoints
    from esolm.hub import located
    from esolm.shards import DOCUMENTS, TokenData

    checkpoint = located(checkpoint)
    if (checkpoint / DOCUMENTS).exists():
        data = TokenData.open(checkpoint, digests=True)
        say(f"{checkpoint} is whole: {data.num_tokens:,} tokens of {data.num_documents:,} documents")
        return
    one = checkpoints.is_step(checkpoint)
    steps = [checkpoint] if one else sorted(checkpoint.glob("step-*"))
    if not steps:
        checkpoints.load(checkpoint)  # says what is wrong
    best = None if one else checkpoints.best(checkpoint)
    for step in steps:
        checkpoints.verify(step)
        say(f"{step} is whole{', the best by validation' if step == best else ''}")


def _recorded(model: "Model") -> dict[str, Any]:
    from esolm.inference import Inference, describe
    from esolm.plain import to_plain

    lacking = model.writer.lacking if isinstance(model.writer, Inference) else ""
    return {
        "algorithm": to_plain(model.algorithm),
        "parameters": model.denoiser.num_parameters,
        "network": to_plain(model.denoiser.config),
        "products": describe(model.writer),
        **({"no_engine": lacking} if lacking else {}),
        **model.facts,
    }


def demo(out: Path = Path("out/demo"), minutes: float = 6.0, seed: int = 0) -> None:
    """Train a small Eso-LM on Shakespeare, watch it write, and leave a report to open.

    Examples:

      esolm demo
      esolm demo --minutes 20 --out out/longer

    In Python:

      demo.run(Path("out/demo"), minutes=6)

    Args:
        out: Folder for the run and report.html.
        minutes: Time for training.
        seed: Of everything.
    """
    from esolm.demo import run

    refuse_unwritable(out)
    run(out, minutes=minutes, seed=seed, console=console(stderr=False))
