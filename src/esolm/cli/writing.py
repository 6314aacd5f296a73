"""`esolm sample` and `esolm infill`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.terminal import DtypeName, console, loaded

if TYPE_CHECKING:
    from esolm.algorithms import Request
    from esolm.model import Model


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
    model = loaded(checkpoint, options.dtype, options.device)
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
    model = loaded(checkpoint, options.dtype, options.device)
    _write(model, model.gaps(text, tokens=tokens, **options.of_request()), options)


def _write(model: "Model", first: "Request", options: Writing) -> None:
    """Write the texts of a request and its next seeds: live in a terminal, as JSON lines, or plainly."""
    from esolm.texts import as_json, requests_of, show

    requests = requests_of(first, options.num, options.seed)
    if options.json or options.output is not None:
        as_json(model, requests, options.output, console=console())
    else:
        show(model, requests, live=options.live, console=console(stderr=False))
