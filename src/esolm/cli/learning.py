"""`esolm train` and `esolm tokenize`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from esolm.cli.parsing import Flag, Maybe, Method
from esolm.cli.terminal import bars, console, device_of, say

if TYPE_CHECKING:
    from esolm.prepare import Source, Text
    from esolm.sinks import Sink
    from esolm.tokenizer import Tokenizer
    from esolm.train import Run

_VOCAB_SIZE = 4096  # of a tokenizer that is learned


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    recipe: Literal["demo", "shakespeare", "family", "lm1b", "owt"] = "shakespeare"
    """The settings to begin with."""
    model: Method = "esolm-b"
    """ar, mdlm, bd3lm, esolm-a, esolm-b, or a class of your own file, which --with FILE.py names."""
    alpha_0: Maybe[float] = None
    """Eso-LM: share of the text that diffusion writes, 0 to 1."""
    block_size: Maybe[int] = None
    """BD3-LM: tokens of a block."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = ()
    """Other settings, as in network.width=512."""
    seed: int = 0
    """Of the weights, the order of the data and all noise."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What it learns from."""

    data: str = "shakespeare"
    """A text file, a folder, JSON lines, Parquet, hf:NAME, or shipped: "shakespeare", "kjv", both: "classics"."""
    pairs: Flag = False
    """The data are prompt and answer pairs; only answers are learned."""
    field: Maybe[str] = None
    """Field of the text (or prompt) in JSON lines, Parquet or a data set; left out, "text" (or "prompt")."""
    answer: str = "answer"
    """Field of the answer, with --pairs."""
    validation: float = 0.05
    """Share of the documents to hold out."""
    tokenizer: Maybe[Path] = None
    """A tokenizer.json or its folder; left out, a BPE is learned from the data."""
    vocab_size: Maybe[int] = None
    """Ids of the BPE that is learned; 258 is plain bytes; left out, 4096."""


@dataclass(frozen=True, kw_only=True)
class Going:
    """Where it runs, and from where to where."""

    out: Path = Path("runs/shakespeare")
    """Folder for checkpoints, journal and tokens."""
    resume: Flag = False
    """Go on with the run in --out, as it began."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CHECKPOINT", help_behavior_hint="")] = None
    """Begin with these weights: continue them on other data, or fine-tune."""
    minutes: Maybe[float] = None
    """Stop and save after this long."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    tensorboard: Flag = False
    """Also write TensorBoard files (needs the extra)."""
    wandb: Maybe[str] = None
    """Also log to this project of Weights & Biases (needs the extra)."""


_SETTINGS, _READING, _GOING = Settings(), Reading(), Going()


def train(method: Settings = _SETTINGS, text: Reading = _READING, run: Going = _GOING) -> None:
    """Train a model: text in, checkpoints and a journal out. Ctrl-C saves; --resume goes on.

    Examples:

      esolm train --out runs/first
      esolm train --data books/ --model esolm-b --alpha-0 0.125 --out runs/books
      esolm train --data qa.jsonl --pairs --field question --from runs/books --out runs/qa
      esolm train --recipe lm1b --data hf:lm1b --tokenizer gpt2/ --device cuda --out runs/lm1b
      esolm train --set network.width=512 optim.schedule.peak=5e-4 --out runs/wide
      esolm train --resume --out runs/wide

    In Python:

      source, folder = prepare.Source(data="books/"), Path("runs/books")
      text = prepare.prepare(source, folder)
      run = recipes.shakespeare(EsoLM(alpha_0=0.125), text.tokenizer.vocab_size)
      train.train(
          run,
          folder,
          tokenizer=text.tokenizer,
          data=text.training(run.network.length),
          validation=text.validation(run.network.length),
          origin=source.origin(),
      )

    Args:
        method: What is trained. `--set help` lists all other settings.
        text: What it learns from.
        run: Where it runs, from where to where.
    """
    if run.resume:
        _refuse_other(method, text, run)
        _resumed(run)
    elif "help" in method.set:
        print("\n".join(f"{key}={value}" for key, value in _keys(_run_of(method)).items()))
    else:
        _begun(_changed(_run_of(method), method, run), text, run)


def tokenize(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")],
    out: Path,
    tokenizer: Maybe[Path] = None,
    vocab_size: Maybe[int] = None,
    pairs: Flag = False,
    field: Maybe[str] = None,
    answer: str = "answer",
) -> None:
    """Turn text into tokens on disk, once; `esolm train` with the same --out and --data reads them from there.

    Examples:

      esolm tokenize books/ --out runs/books --vocab-size 8192
      esolm tokenize hf:roneneldan/TinyStories --out runs/stories --tokenizer gpt2/
      esolm tokenize qa.jsonl --pairs --field question --out runs/qa

    In Python:

      source = prepare.Source(data="books/")
      tokenizer, tokens = prepare.tokens(source, Path("runs/books"), vocab_size=8192)

    Args:
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or shipped: "shakespeare", "kjv", both: "classics".
        out: Folder for the tokenizer and the tokens.
        tokenizer: A tokenizer.json or its folder; left out, a BPE is learned from the data.
        vocab_size: Ids of the BPE that is learned; 258 is plain bytes; left out, 4096.
        pairs: The data are prompt and answer pairs.
        field: Field of the text (or prompt) in JSON lines, Parquet or a data set; left out, "text" (or "prompt").
        answer: Field of the answer, with --pairs.
    """
    from esolm import prepare

    _refuse_answer(answer, pairs)
    source = prepare.Source(data=data, pairs=pairs, field=field, answer=answer)
    known = _tokenizer(tokenizer, None, out, vocab_size)
    _, tokens = prepare.tokens(source, out, tokenizer=known, vocab_size=vocab_size or _VOCAB_SIZE, console=bars())
    say(f"{tokens.num_tokens:,} tokens of {tokens.num_documents:,} {'pairs' if pairs else 'documents'} in {out}")


def _refuse_answer(answer: str, pairs: bool) -> None:
    if answer != _READING.answer and not pairs:
        raise ValueError("--answer names the field of answers: it needs --pairs")


def _run_of(settings: Settings) -> "Run":
    """The run of a recipe, before other settings; the tokenizer will tell the size of its vocabulary."""
    from esolm import recipes

    method = recipes.method(settings.model, settings.alpha_0, settings.block_size)
    run: Run = getattr(recipes, settings.recipe)(method, _VOCAB_SIZE)
    return run


def _begun(run: "Run", reading: Reading, going: Going) -> None:
    """A new run. Mistakes in options come to light before the text is read."""
    from esolm import prepare
    from esolm.plain import replace
    from esolm.train import refuse_used

    device, sinks = device_of(going.device), _sinks(going)
    refuse_used(going.out)
    _refuse_answer(reading.answer, reading.pairs)
    run = run if going.from_ is None else prepare.like(run, going.from_)
    source = prepare.Source(
        data=reading.data,
        pairs=reading.pairs,
        field=reading.field,
        answer=reading.answer,
        validation=reading.validation,
        seed=run.seed,
    )
    known = _tokenizer(reading.tokenizer, going.from_, going.out, reading.vocab_size)
    size = reading.vocab_size or _VOCAB_SIZE
    text = prepare.prepare(source, going.out, tokenizer=known, vocab_size=size, console=bars())
    run = replace(run, {"network.vocab_size": text.tokenizer.vocab_size})
    _learn(run, text, source, going, device, sinks, start=going.from_)


def _tokenizer(path: Path | None, start: Path | None, out: Path, vocab_size: int | None) -> "Tokenizer | None":
    """The tokenizer that is given, or that --from or the folder has; None if one is to be learned."""
    from esolm import prepare

    kept = out / "tokenizer.json"
    known = prepare.tokenizer_of(path or (kept if start is None and kept.exists() else None), start)
    if known is not None and vocab_size not in (None, known.vocab_size):
        where = path or start or kept
        raise ValueError(
            f"the tokenizer of {where} has {known.vocab_size} ids, not {vocab_size}: leave out --vocab-size"
        )
    return known


def _resumed(going: Going) -> None:
    from dataclasses import replace

    from esolm import prepare

    device, sinks = device_of(going.device), _sinks(going)
    run, source = prepare.resumed(going.out)
    run = run if going.minutes is None else replace(run, minutes=going.minutes)
    text = prepare.prepare(source, going.out, console=bars())
    _learn(run, text, source, going, device, sinks, resume=True)


def _sinks(going: Going) -> "list[Sink]":
    """Where figures go beside the journal. Made before the text is read: a missing package comes to light here."""
    from esolm.sinks import TensorBoard, WeightsAndBiases

    chosen: list[Sink] = [TensorBoard()] if going.tensorboard else []
    return chosen if going.wandb is None else [*chosen, WeightsAndBiases(going.wandb)]


def _learn(
    run: "Run", text: "Text", source: "Source", going: Going, device: str, sinks: "list[Sink]", **how: Any
) -> None:
    from esolm.train import train as run_training

    outcome = run_training(
        run,
        going.out,
        tokenizer=text.tokenizer,
        data=text.training(run.network.length, seed=run.seed),
        validation=text.validation(run.network.length),
        origin=source.origin(),
        device=device,
        sinks=sinks,
        console=console(),
        **how,
    )
    if outcome.interrupted:
        say(f"stopped at step {outcome.step:,} and saved; go on with: esolm train --resume --out {going.out}")
        sys.exit(75)
    found = outcome.validation
    told = f"; validation {found.nats_per_token:.3f} ± {found.standard_error:.3f} nats a token" if found else ""
    say(f"saved {outcome.path}{told}\nwrite with it: esolm sample {going.out}")


def _refuse_other(settings: Settings, reading: Reading, going: Going) -> None:
    """A resumed run is the run that began, so that an option which would change it is refused."""
    groups: tuple[tuple[Any, Any], ...] = ((settings, _SETTINGS), (reading, _READING))
    given = [
        "--" + part.name.replace("_", "-")
        for group, default in groups
        for part in fields(group)
        if getattr(group, part.name) != getattr(default, part.name)
    ]
    if going.from_ is not None:
        given.append("--from")
    if given:
        raise ValueError(f"--resume goes on with the run in {going.out} as it began: leave out {', '.join(given)}")


def _changed(run: "Run", settings: Settings, going: Going) -> "Run":
    """The run with the settings of `--set`, `--seed` and `--minutes`."""
    from esolm.plain import replace

    changes = _assignments(settings.set)
    for key, option in (("seed", "--seed"), ("minutes", "--minutes"), ("network.vocab_size", "--vocab-size")):
        if key in changes:
            raise ValueError(f"{key} has an option of its own: use {option}")
    known = _keys(run)
    for key in changes:
        inner = [name for name in known if name.endswith(f".{key}")]
        if inner:
            raise ValueError(f"there is no setting {key!r}; did you mean {' or '.join(map(repr, inner))}?")
    try:
        return replace(run, {**changes, "seed": settings.seed, "minutes": going.minutes})
    except ValueError as problem:
        hint = "; --set help lists the keys" if "unknown key" in str(problem) else ""
        raise ValueError(f"{problem}{hint}") from None


def _keys(run: "Run") -> dict[str, str]:
    """Every setting of a run by its dotted key, as `--set` takes it."""
    from esolm.plain import to_plain

    found: dict[str, str] = {}
    inside = [("", to_plain(run))]
    while inside:
        key, value = inside.pop()
        if isinstance(value, dict):
            inside += reversed([(f"{key}.{name}".removeprefix("."), part) for name, part in value.items()])
        else:
            found[key] = value if isinstance(value, str) else json.dumps(value)
    return found


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
