"""`esolm train` and `esolm tokenize`."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.parsing import Flag, Maybe
from esolm.cli.settings import VOCAB_SIZE, Settings, changed, keys, run_of
from esolm.cli.terminal import bars, console, device_of, refuse_unwritable, say

if TYPE_CHECKING:
    from esolm.prepare import Mixed, MixedText, Source, Text
    from esolm.ranks import Ranks
    from esolm.sinks import Sink
    from esolm.tokenizer import Tokenizer
    from esolm.train import Run


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What it learns from."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA ...")] = ("shakespeare",)
    """A file, a folder, JSON lines, Parquet, hf:NAME, or shipped: shakespeare, kjv, classics (both). Several: mixed."""
    weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="WEIGHT ...", help_behavior_hint="")] = ()
    """Of a mixture: how often each of --data is learned from; left out, all alike."""
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
    auto_resume: Flag = False
    """Go on if --out holds a run, else begin one: for jobs that are started again with the same options."""
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
    rank_timeout: float = 25.0
    """With torchrun: after so many seconds without an answer a rank is taken for dead."""


_SETTINGS, _READING, _GOING = Settings(), Reading(), Going()


def train(method: Settings = _SETTINGS, text: Reading = _READING, run: Going = _GOING) -> None:
    """Train a model: text in, checkpoints and a journal out. Ctrl-C saves; --resume goes on.

    Examples:

      esolm train --out runs/first
      esolm train --data books/ --model esolm-b --alpha-0 0.125 --out runs/books
      esolm train --data books/ letters.jsonl --weights 3 1 --out runs/both
      esolm train --data qa.jsonl --pairs --field question --from runs/books --out runs/qa
      esolm train --recipe lm1b --data hf:lm1b --tokenizer gpt2/ --device cuda --out runs/lm1b
      esolm train --set network.width=512 optim.schedule.peak=5e-4 --out runs/wide
      esolm train --resume --out runs/wide
      torchrun --nproc-per-node 8 --max-restarts 3 -m esolm train --recipe lm1b --auto-resume --out runs/lm1b

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
    if "help" in method.set:
        print("\n".join(f"{key}={value}" for key, value in keys(run_of(method)).items()))
        return
    if run.resume:
        _refuse_other(method, text, run)
    from esolm import checkpoint, ranks

    with ranks.joined(answer=run.rank_timeout) as together:
        again = run.auto_resume or ranks.started_again()
        if run.resume:
            _resumed(run, together)
        elif again and together.agree(together.leads and checkpoint.holds_steps(run.out)):
            _resumed(run, together, as_in=(changed(run_of(method), method, run.minutes), _source(text, method.seed)))
        else:
            _begun(changed(run_of(method), method, run.minutes), text, run, together)


def tokenize(
    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...", help_behavior_hint="")],
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
      esolm tokenize books/ letters.jsonl --out runs/both

    In Python:

      source = prepare.Source(data="books/")
      tokenizer, tokens = prepare.tokens(source, Path("runs/books"), vocab_size=8192)

    Args:
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or shipped: "shakespeare", "kjv", both: "classics".
            Of several, for a mixture, each is kept by itself, under one tokenizer.
        out: Folder for the tokenizer and the tokens.
        tokenizer: A tokenizer.json or its folder; left out, a BPE is learned from the data.
        vocab_size: Ids of the BPE that is learned; 258 is plain bytes; left out, 4096.
        pairs: The data are prompt and answer pairs.
        field: Field of the text (or prompt) in JSON lines, Parquet or a data set; left out, "text" (or "prompt").
        answer: Field of the answer, with --pairs.
    """
    from esolm import prepare

    _refuse_answer(answer, pairs)
    refuse_unwritable(out)
    source = _source(Reading(data=data, pairs=pairs, field=field, answer=answer), seed=0)
    known = _tokenizer(tokenizer, None, out, vocab_size)
    how: dict[str, Any] = {"tokenizer": known, "vocab_size": vocab_size or VOCAB_SIZE, "console": bars()}
    if isinstance(source, prepare.Mixed):
        found = prepare.tokens_of_mixed(source, out, **how)[1]
    else:
        found = [prepare.tokens(source, out, **how)[1]]
    tokens, count = sum(data.num_tokens for data in found), sum(data.num_documents for data in found)
    say(f"{tokens:,} tokens of {count:,} {'pairs' if pairs else 'documents'} in {out}")


def _refuse_answer(answer: str, pairs: bool) -> None:
    if answer != _READING.answer and not pairs:
        raise ValueError("--answer names the field of answers: it needs --pairs")


def _begun(run: "Run", reading: Reading, going: Going, ranks: "Ranks") -> None:
    """A new run. Mistakes in options come to light before the text is read."""
    from esolm import prepare
    from esolm.plain import replace
    from esolm.train import refuse_used

    device, sinks = device_of(going.device), _sinks(going)
    with ranks.together():
        refuse_used(going.out)
        refuse_unwritable(going.out)
    _refuse_answer(reading.answer, reading.pairs)
    run = run if going.from_ is None else prepare.like(run, going.from_)
    source = _source(reading, run.seed)
    with ranks.leader_first():
        known = _tokenizer(reading.tokenizer, going.from_, going.out, reading.vocab_size)
        text = _text(source, going.out, tokenizer=known, vocab_size=reading.vocab_size or VOCAB_SIZE)
    run = replace(run, {"network.vocab_size": text.tokenizer.vocab_size})
    _learn(run, text, source, going, device, sinks, ranks=ranks, start=going.from_)


def _source(reading: Reading, seed: int) -> "Source | Mixed":
    """What is learned from. ValueError for weights that do not fit."""
    from esolm import prepare

    rest: dict[str, Any] = {"pairs": reading.pairs, "field": reading.field, "answer": reading.answer}
    sources = [prepare.Source(data=data, validation=reading.validation, seed=seed, **rest) for data in reading.data]
    if not sources:
        raise ValueError("--data needs a text to learn from")
    if len(sources) == 1:
        if reading.weights:
            raise ValueError("--weights are of several texts: give them all to --data, or leave --weights out")
        return sources[0]
    return prepare.Mixed(sources=tuple(sources), weights=reading.weights or (1.0,) * len(sources))


def _text(source: "Source | Mixed", folder: Path, **how: Any) -> "Text | MixedText":
    from esolm import prepare

    if isinstance(source, prepare.Mixed):
        return prepare.prepare_mixed(source, folder, console=bars(), **how)
    return prepare.prepare(source, folder, console=bars(), **how)


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


def _resumed(going: Going, ranks: "Ranks", as_in: "tuple[Run, Source | Mixed] | None" = None) -> None:
    """Go on with the run in --out; one that is started again with its options must be `as_in` these say."""
    from esolm import prepare

    device, sinks = device_of(going.device), _sinks(going)
    with ranks.together():
        run, source = prepare.resumed(going.out)
        if as_in is not None:
            _refuse_changed((run, source), as_in, going)
    run = run if as_in is None else replace(run, micro_batch=as_in[0].micro_batch)
    run = run if going.minutes is None else replace(run, minutes=going.minutes)
    with ranks.leader_first():
        kept = (going.out / "tokenizer.json").exists()  # the checkpoint has it too, but is read whole for it
        text = _text(source, going.out, tokenizer=None if kept else prepare.tokenizer_of(None, going.out))
    _learn(run, text, source, going, device, sinks, ranks=ranks, resume=True)


def _refuse_changed(begun: "tuple[Run, Source | Mixed]", asked: "tuple[Run, Source | Mixed]", going: Going) -> None:
    """ValueError unless a run is what the options ask for; the network of --from, the vocabulary and the
    size of a micro batch, which changes memory and no gradient, are not asked."""
    before, now = (keys(run) | keys(source) for run, source in (begun, asked))
    free = ("minutes", "network.vocab_size", "micro_batch")
    for key in sorted(before.keys() | now.keys()):
        if key in free or (going.from_ is not None and key.startswith("network.")):
            continue
        if before.get(key) != now.get(key):
            told = f"{key} = {before.get(key)}, the options say {now.get(key)}"
            raise ValueError(f"the run in {going.out} has {told}: choose the same, or another --out")


def _sinks(going: Going) -> "list[Sink]":
    """Where figures go beside the journal. Made before the text is read: a missing package comes to light here."""
    from esolm.sinks import TensorBoard, WeightsAndBiases

    chosen: list[Sink] = [TensorBoard()] if going.tensorboard else []
    return chosen if going.wandb is None else [*chosen, WeightsAndBiases(going.wandb)]


def _learn(
    run: "Run",
    text: "Text | MixedText",
    source: "Source | Mixed",
    going: Going,
    device: str,
    sinks: "list[Sink]",
    ranks: "Ranks",
    **how: Any,
) -> None:
    from esolm.ranks import device as device_of_rank
    from esolm.sinks import plus_minus
    from esolm.train import train as run_training

    outcome = run_training(
        run,
        going.out,
        tokenizer=text.tokenizer,
        data=text.training(run.network.length, seed=run.seed),
        validation=text.validation(run.network.length),
        origin=source.origin(),
        device=device_of_rank(device),
        sinks=sinks,
        console=console(),
        ranks=ranks,
        **how,
    )
    if outcome.interrupted:
        if ranks.leads:
            say(f"stopped at step {outcome.step:,} and saved; go on with: esolm train --resume --out {going.out}")
        sys.exit(75)
    if not ranks.leads:
        return
    found = outcome.validation
    figure = "" if found is None else plus_minus(found.nats_per_token, found.standard_error)
    told = f"; validation {figure} nats a token" if figure else ""
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
    given += ["--from"] if going.from_ is not None else []
    given += ["--auto-resume"] if going.auto_resume else []
    if given:
        raise ValueError(f"--resume goes on with the run in {going.out} as it began: leave out {', '.join(given)}")
