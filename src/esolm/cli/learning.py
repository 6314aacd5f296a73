"""`esolm train` and `esolm tokenize`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from esolm.cli.terminal import MethodName, console, device_of, say

if TYPE_CHECKING:
    from esolm.prepare import Source, Text
    from esolm.train import Run


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What to learn from."""

    data: str = "shakespeare"
    """A text file, a folder, JSON lines, Parquet, hf:NAME, or the shipped "shakespeare"."""
    pairs: bool = False
    """The data are prompt and answer pairs; only answers are learned."""
    field: str | None = None
    """Field of the text (or prompt) in JSON lines, Parquet or a data set."""
    answer: str = "answer"
    """Field of the answer, with --pairs."""
    validation: float = 0.05
    """Share of the documents to hold out."""
    tokenizer: Path | None = None
    """A tokenizer.json (or its folder); left out, a BPE is trained on the data."""
    vocab_size: int = 4096
    """Size of the BPE that is trained; 258 is plain bytes."""


_READING = Reading()


def train(
    recipe: Literal["demo", "shakespeare", "lm1b", "owt"] = "shakespeare",
    model: MethodName = "esolm-b",
    out: Path = Path("runs/shakespeare"),
    reading: Annotated[Reading, tyro.conf.arg(name="")] = _READING,
    alpha_0: float | None = None,
    block_size: int | None = None,
    set: tuple[str, ...] = (),
    minutes: float | None = None,
    seed: int = 0,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    resume: bool = False,
    device: str = "auto",
    tensorboard: bool = False,
) -> None:
    """Train a model: text in, checkpoints and a journal out. Ctrl-C saves; --resume goes on.

    Examples:

      esolm train --out runs/first
      esolm train --data books/ --model esolm-b --alpha-0 0.125 --out runs/books
      esolm train --data qa.jsonl --pairs --field question --from runs/books --out runs/qa
      esolm train --recipe lm1b --data hf:lm1b --tokenizer tokenizer.json --device cuda --out runs/lm1b
      esolm train --set network.width=512 optim.schedule.peak=5e-4 --out runs/wide

    In Python: esolm.train(recipes.shakespeare(EsoLM(alpha_0=0.125), vocab_size), folder, ...).

    Args:
        recipe: The settings to begin with.
        model: The method.
        out: Folder for checkpoints, journal and tokenized text.
        reading: What to learn from.
        alpha_0: Eso-LM's share of the text that diffusion writes, 0 to 1.
        block_size: BD3-LM's block.
        set: Other settings, as key=value (see --set nothing=0 for the keys).
        minutes: Stop and save after this long.
        seed: Of the weights, the order of the data and all noise.
        from_: Begin with the weights of this checkpoint: continue it, or fine-tune.
        resume: Go on with the run in --out.
        device: auto, cpu, cuda, ...
        tensorboard: Also write TensorBoard files (extra).
    """
    from esolm import recipes

    if resume:
        _resumed(out, device, tensorboard)
        return
    run = getattr(recipes, recipe)(recipes.method(model, alpha_0, block_size), reading.vocab_size)
    changes = {"seed": seed, "minutes": minutes, **_assignments(set)}
    _begun(run, changes, reading, out, start=from_, device=device, tensorboard=tensorboard)


def tokenize(
    data: tyro.conf.Positional[str],
    out: Path,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    field: str = "text",
) -> None:
    """Turn text into tokens on disk, once; training reads them from there.

    Examples:

      esolm tokenize books/ --out tokens/books --vocab-size 8192
      esolm tokenize hf:roneneldan/TinyStories --out tokens/stories --tokenizer tokenizer.json

    In Python: data.tokenize(corpus.documents("books/"), tokenizer, folder).

    Args:
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or the shipped "shakespeare".
        out: Folder for the tokenizer and the tokens.
        tokenizer: A tokenizer.json (or its folder); left out, a BPE is trained on the data.
        vocab_size: Size of the BPE that is trained; 258 is plain bytes.
        field: Field of the text in JSON lines, Parquet or a data set.
    """
    from esolm import prepare

    source = prepare.Source(data=data, field=field)
    known = prepare.tokenizer_of(tokenizer, None)
    _, tokens = prepare.tokens(source, out, tokenizer=known, vocab_size=vocab_size, console=console())
    say(f"{tokens.num_tokens:,} tokens of {tokens.num_documents:,} documents in {out}")


def _begun(
    run: "Run",
    changes: dict[str, object],
    reading: Reading,
    out: Path,
    *,
    start: Path | None,
    device: str,
    tensorboard: bool,
) -> None:
    """A new run. Mistakes in options come to light before the text is read."""
    from esolm import prepare
    from esolm.plain import replace
    from esolm.train import refuse_used

    refuse_used(out)
    run = replace(run if start is None else prepare.like(run, start), changes)
    source = prepare.Source(
        data=reading.data,
        pairs=reading.pairs,
        field=reading.field,
        answer=reading.answer,
        validation=reading.validation,
        seed=run.seed,
    )
    known = prepare.tokenizer_of(reading.tokenizer, start)
    text = prepare.prepare(source, out, tokenizer=known, vocab_size=reading.vocab_size, console=console())
    run = replace(run, {"network.vocab_size": text.tokenizer.vocab_size})
    _learn(run, out, text, source, start=start, device=device, tensorboard=tensorboard)


def _resumed(out: Path, device: str, tensorboard: bool) -> None:
    from esolm import prepare

    run, source = prepare.resumed(out)
    text = prepare.prepare(source, out, console=console())
    _learn(run, out, text, source, resume=True, device=device, tensorboard=tensorboard)


def _learn(run: "Run", out: Path, text: "Text", source: "Source", *, device: str, **options: Any) -> None:
    from esolm.train import train as run_training

    outcome = run_training(
        run,
        out,
        tokenizer=text.tokenizer,
        data=text.training(run.network.length, seed=run.seed),
        validation=text.validation(run.network.length),
        origin=source.origin(),
        device=device_of(device),
        console=console(),
        **options,
    )
    if outcome.interrupted:
        say(f"stopped at step {outcome.step:,} and saved; go on with: esolm train --resume --out {out}")
        sys.exit(75)
    found = outcome.validation
    told = f"; validation {found.nats_per_token:.3f} ± {found.standard_error:.3f} nats a token" if found else ""
    say(f"saved {outcome.path}{told}\nwrite with it: esolm sample {out}")


def _assignments(settings: Sequence[str]) -> dict[str, object]:
    """`key=value` settings; a value is JSON where it is JSON, else a word."""
    changes: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    return changes
