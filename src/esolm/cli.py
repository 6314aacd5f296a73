"""The command line: each command a function of a few lines over the Python call of equal power.

torch is imported inside the commands, so that `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong use,
3 data or a checkpoint is missing or damaged, 75 stopped by a signal after saving (go on with --resume), 130 Ctrl-C.
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from esolm import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from esolm.algorithms import Request
    from esolm.model import Model

MethodName = Literal["ar", "mdlm", "bd3lm", "esolm-a", "esolm-b"]
DtypeName = Literal["auto", "float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How to write."""

    num: int = 1
    """How many texts."""
    alpha_0: float | None = None
    """Share that diffusion writes, 0 to 1 (Eso-LM); as trained, if left out."""
    num_steps: int | None = None
    """Diffusion steps; one token a step, if left out."""
    interleaved: bool = False
    """Diffusion steps take evenly spread positions (better with few steps)."""
    temperature: float = 1.0
    """0 is greedy, 1 the model's own."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens."""
    seed: int = 0
    """The same seed writes the same texts."""
    dtype: DtypeName = "auto"
    """Of the network's products; auto asks the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    live: bool = True
    """Show the text being written (in a terminal)."""
    json: bool = False
    """Print JSON lines."""
    output: Path | None = None
    """Write JSON lines to this file."""

    def of_request(self) -> dict[str, Any]:
        """The options that `Model.request` takes."""
        from esolm.order import Interleaved

        return {
            "alpha_0": self.alpha_0,
            "num_steps": self.num_steps,
            "positions": Interleaved() if self.interleaved else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }


_WRITING = Writing()


def train(
    recipe: Literal["demo", "shakespeare", "lm1b", "owt"] = "shakespeare",
    model: MethodName = "esolm-b",
    data: str = "shakespeare",
    out: Path = Path("runs/shakespeare"),
    pairs: bool = False,
    field: str | None = None,
    answer: str = "answer",
    validation: float = 0.05,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
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
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or the shipped "shakespeare".
        out: Folder for checkpoints, journal and tokenized text.
        pairs: The data are prompt and answer pairs; only answers are learned.
        field: Field of the text (or prompt) in JSON lines, Parquet or a data set.
        answer: Field of the answer, with --pairs.
        validation: Share of the documents to hold out.
        tokenizer: A tokenizer.json (or its folder); left out, a BPE is trained on the data.
        vocab_size: Size of the BPE that is trained; 258 is plain bytes.
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
    from esolm import prepare, recipes
    from esolm.plain import replace
    from esolm.train import refuse_used
    from esolm.train import train as run_training

    source = prepare.Source(data=data, pairs=pairs, field=field, answer=answer, validation=validation, seed=seed)
    if resume:
        run, source = prepare.resumed(out)
        text = prepare.prepare(source, out, console=_console())
    else:
        # mistakes in options come to light before the text is read
        refuse_used(out)
        run = getattr(recipes, recipe)(recipes.method(model, alpha_0, block_size), vocab_size)
        if from_ is not None:
            run = prepare.like(run, from_)
        changes: dict[str, object] = {"seed": seed, "minutes": minutes}
        run = replace(run, changes | _assignments(set))
        known = prepare.tokenizer_of(tokenizer, from_)
        text = prepare.prepare(source, out, tokenizer=known, vocab_size=vocab_size, console=_console())
        run = replace(run, {"network.vocab_size": text.tokenizer.vocab_size})
    outcome = run_training(
        run,
        out,
        tokenizer=text.tokenizer,
        data=text.training(run.network.length, seed=run.seed),
        validation=text.validation(run.network.length),
        resume=resume,
        start=from_,
        origin=source.origin(),
        tensorboard=tensorboard,
        device=_device(device),
        console=_console(),
    )
    if outcome.interrupted:
        _say(f"stopped at step {outcome.step:,} and saved; go on with: esolm train --resume --out {out}")
        sys.exit(75)
    found = outcome.validation
    told = f"; validation {found.nats_per_token:.3f} ± {found.standard_error:.3f} nats a token" if found else ""
    _say(f"saved {outcome.path}{told}\nwrite with it: esolm sample {out}")


def sample(
    checkpoint: tyro.conf.Positional[Path],
    prompt: str = "",
    suffix: str = "",
    length: int | None = None,
    options: Annotated[Writing, tyro.conf.arg(name="")] = _WRITING,
) -> None:
    """Write texts, and watch them being written.

    Examples:

      esolm sample runs/first
      esolm sample runs/first --prompt "ROMEO:" --num-steps 16 --seed 3
      esolm sample runs/first --num 100 --output texts.jsonl

    In Python: esolm.load("runs/first").sample(num, prompt="ROMEO:", num_steps=16, seed=3).

    Args:
        checkpoint: A run's folder or one step of it.
        prompt: Text to begin with.
        suffix: Text to end with.
        length: Tokens of a text, the prompt's included; the model's, if left out.
        options: How to write.
    """
    model = _load(checkpoint, options.dtype, options.device)
    _write(model, model.request(prompt=prompt, suffix=suffix, length=length, **options.of_request()), options)


def infill(
    checkpoint: tyro.conf.Positional[Path],
    text: tyro.conf.Positional[str],
    tokens: int | None = None,
    options: Annotated[Writing, tyro.conf.arg(name="")] = _WRITING,
) -> None:
    """Fill the blanks of a text: runs of two or more underscores, a token for each underscore.

    Examples:

      esolm infill runs/first "To be, or ____, that is the question"
      esolm infill runs/first "ROMEO: __ JULIET: __" --tokens 12

    In Python: esolm.load("runs/first").infill("To be, or ____, that is the question").

    Args:
        checkpoint: A run's folder or one step of it.
        text: The text with its blanks.
        tokens: Tokens of every blank; one for each underscore, if left out.
        options: How to write.
    """
    model = _load(checkpoint, options.dtype, options.device)
    _write(model, model.gaps(text, tokens=tokens, **options.of_request()), options)


def evaluate(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    data: str = "shakespeare",
    field: str = "text",
    samples: int = 4,
    orders: int = 0,
    texts: int | None = 256,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Likelihoods of a text under models, on one scale: nats a token, bits a byte, perplexity.

    Examples:

      esolm evaluate runs/first --data held-out.txt
      esolm evaluate runs/ar runs/mdlm runs/esolm --data held-out.txt --orders 10

    In Python: evaluate.evaluate(model, documents, samples=4).

    Args:
        checkpoints: Runs' folders or single steps.
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or the shipped "shakespeare".
        field: Field of the text in JSON lines, Parquet or a data set.
        samples: Draws of the NELBO for each text.
        orders: Also the importance-weighted bound of this many orders (Eso-LM).
        texts: At most this many windows of text; all, with --texts None.
        seed: Of the draws.
        device: auto, cpu, cuda, ...
        json: Print JSON lines instead of a table.
    """
    from esolm import corpus, prepare
    from esolm.evaluate import evaluate as measure
    from esolm.evaluate import table

    if not checkpoints:
        raise ValueError("give at least one checkpoint: esolm evaluate CHECKPOINT --data FILE")
    documents = list(corpus.documents(prepare.located(data), field=field))
    rows = []
    for path in checkpoints:
        model = _load(path, "float32", device)
        rows += measure(
            model, documents, name=str(path), samples=samples, orders=orders, texts=texts, seed=seed, console=_console()
        )
    if json:
        for row in rows:
            _print_json(row.values())
    else:
        _console(stderr=False).print(table(rows))


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
    _, tokens = prepare.tokens(source, out, tokenizer=known, vocab_size=vocab_size, console=_console())
    _say(f"{tokens.num_tokens:,} tokens of {tokens.num_documents:,} documents in {out}")


def info(checkpoint: tyro.conf.Positional[Path], json: bool = False) -> None:
    """What a checkpoint is: method, size, how it was trained, what its products run on here.

    Examples:

      esolm info runs/first

    In Python: esolm.load("runs/first").info().

    Args:
        checkpoint: A run's folder or one step of it.
        json: Print JSON.
    """
    told = _load(checkpoint, "auto", "cpu").info()
    if json:
        _print_json(told)
        return
    width = max(map(len, told))
    for label, value in told.items():
        print(f"{label:<{width}}  {value}")


def verify(checkpoint: tyro.conf.Positional[Path]) -> None:
    """Check a checkpoint byte for byte.

    Examples:

      esolm verify runs/first

    In Python: checkpoint.verify(checkpoint.newest(folder)).

    Args:
        checkpoint: A run's folder or one step of it.
    """
    from esolm import checkpoint as checkpoints

    path = checkpoint if checkpoints.is_step(checkpoint) else checkpoints.newest(checkpoint)
    if path is None:
        raise checkpoints.CheckpointError(f"no checkpoint in {checkpoint}; expected a folder like step-000001000 in it")
    checkpoints.verify(path)
    _say(f"{path} is whole")


def demo(out: Path = Path("out/demo"), minutes: float = 6.0, seed: int = 0) -> None:
    """Train a small Eso-LM on Shakespeare, watch it write, and leave a report to open.

    Examples:

      esolm demo
      esolm demo --minutes 20 --out out/longer

    In Python: demo.run(Path("out/demo"), minutes=6).

    Args:
        out: Folder for the run and report.html.
        minutes: Time for training.
        seed: Of everything.
    """
    from esolm.demo import run

    run(out, minutes=minutes, seed=seed, console=_console(stderr=False))


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "sample": sample,
    "infill": infill,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "info": info,
    "verify": verify,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of the user are one line on stderr, and an exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments in (["--version"], ["-V"]):
        print(f"esolm {__version__}")
        return
    name = arguments[0] if arguments else ""
    _suggest_command(arguments)
    try:
        if name not in _COMMANDS:  # --help, or nothing
            tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog="esolm", description=_DESCRIPTION, args=arguments)
        command = _COMMANDS[name]
        told = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0].strip()
        tyro.cli(command, prog=f"esolm {name}", description=told, args=arguments[1:])
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, ArithmeticError, OSError) as problem:
        _fail(str(problem), _exit_code(problem))


_DESCRIPTION = "Language models between autoregression and masked diffusion: train, evaluate, sample."


def _suggest_command(arguments: Sequence[str]) -> None:
    from esolm.plain import nearest

    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        _fail(f"there is no command {arguments[0]!r}{nearest(arguments[0], _COMMANDS)}; there are {known}", 2)


def _exit_code(problem: Exception) -> int:
    from esolm.checkpoint import CheckpointError
    from esolm.corpus import DataError

    if isinstance(problem, CheckpointError | DataError):
        return 3
    return 2 if isinstance(problem, ValueError) else 1


def _fail(message: str, code: int) -> NoReturn:
    print(f"esolm: {message}", file=sys.stderr)
    sys.exit(code)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _print_json(data: object) -> None:
    print(json.dumps(data, ensure_ascii=False))


def _console(*, stderr: bool = True) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {name!r} here: use cpu, or auto") from None
    return name


def _load(path: Path, dtype: DtypeName, device: str) -> "Model":
    from esolm.model import load

    return load(path, dtype=dtype, device=_device(device))


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


def _write(model: "Model", first: "Request", options: Writing) -> None:
    """Write the texts of a request and its next seeds: live in a terminal, as JSON lines, or plainly."""
    from esolm.texts import as_json, requests_of, show

    requests = requests_of(first, options.num, options.seed)
    if options.json or options.output is not None:
        as_json(model, requests, options.output, console=_console())
    else:
        show(model, requests, live=options.live, console=_console(stderr=False))
