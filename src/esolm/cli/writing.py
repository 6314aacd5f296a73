"""`esolm sample` and `esolm infill`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.parsing import Checkpoint, DtypeName, Flag, Maybe, Words
from esolm.cli.terminal import bars, console, loaded

if TYPE_CHECKING:
    from esolm.algorithms import Request
    from esolm.model import Model


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How texts are written."""

    num: int = 1
    """How many texts."""
    seed: int = 0
    """The same seed writes the same texts."""
    temperature: float = 1.0
    """0 is greedy, 1 the model's own."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share; 1 keeps all."""
    top_k: Maybe[int] = None
    """Keep this many of the likeliest tokens; left out, all."""
    alpha_0: Maybe[float] = None
    """Eso-LM: share that diffusion writes, 0 to 1; left out, as trained."""
    num_steps: Maybe[int] = None
    """Diffusion steps; left out, one token a step."""
    interleaved: Flag = False
    """Diffusion steps take evenly spread positions (better with few steps)."""
    dtype: DtypeName = "auto"
    """Of the network's weights; auto asks the CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where texts go."""

    live: Flag = True
    """Do not show a text while it is written."""
    json: Flag = False
    """Print JSON lines."""
    output: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FILE")] = None
    """Write JSON lines to this file."""


_WRITING, _OUTPUT = Writing(), Output()


def sample(
    checkpoint: Checkpoint,
    prompt: Words = "",
    suffix: Words = "",
    length: Maybe[int] = None,
    writing: Writing = _WRITING,
    output: Output = _OUTPUT,
) -> None:
    """Write texts, and watch them being written.

    Examples:

      esolm sample runs/first
      esolm sample runs/first --prompt "JULIET." --num-steps 16 --seed 3
      esolm sample runs/first --num 100 --output texts.jsonl

    In Python:

      model = esolm.load("runs/first")
      texts = model.sample(100, prompt="JULIET.", num_steps=16, seed=3)

    Args:
        checkpoint: A run's folder or one step of it.
        prompt: What texts begin with.
        suffix: What texts end with.
        length: Tokens of a text, prompt and suffix included; left out, as many as the model holds.
        writing: How they are written.
        output: Where they go.
    """
    model = loaded(checkpoint, writing.dtype, writing.device)
    _write(model, model.request(prompt=prompt, suffix=suffix, length=length, **_of_request(writing)), writing, output)


def infill(
    checkpoint: Checkpoint,
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT", help_behavior_hint="")],
    tokens: Maybe[int] = None,
    writing: Writing = _WRITING,
    output: Output = _OUTPUT,
) -> None:
    """Fill the blanks of a text: runs of two or more underscores, a token for each underscore.

    Examples:

      esolm infill runs/first "To be, or ____, that is the question"
      esolm infill runs/first "JULIET. __ ROMEO. __" --tokens 12

    In Python:

      model = esolm.load("runs/first")
      text = model.infill("JULIET. __ ROMEO. __", tokens=12)

    Args:
        checkpoint: A run's folder or one step of it.
        text: The text with its blanks.
        tokens: Tokens of every blank; left out, one for each underscore.
        writing: How they are written.
        output: Where they go.
    """
    model = loaded(checkpoint, writing.dtype, writing.device)
    _write(model, model.gaps(text, tokens=tokens, **_of_request(writing)), writing, output)


def _write(model: "Model", first: "Request", writing: Writing, output: Output) -> None:
    """Write the texts of a request and its next seeds: live in a terminal, as JSON lines, or plainly."""
    from esolm.texts import as_json, requests_of, show

    requests = requests_of(first, writing.num, writing.seed)
    if output.json or output.output is not None:
        as_json(model, requests, output.output, console=bars())
    else:
        show(model, requests, live=output.live, console=console(stderr=False))


def _of_request(writing: Writing) -> dict[str, Any]:
    """The options that `Model.request` takes."""
    from esolm.order import Interleaved

    return {
        "alpha_0": writing.alpha_0,
        "num_steps": writing.num_steps,
        "positions": Interleaved() if writing.interleaved else None,
        "temperature": writing.temperature,
        "top_k": writing.top_k,
        "top_p": writing.top_p,
        "seed": writing.seed,
    }
