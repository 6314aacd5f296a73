"""`esolm import`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from esolm.cli.parsing import Maybe, MaybeMethod
from esolm.cli.terminal import print_json

if TYPE_CHECKING:
    from esolm.algorithms import Algorithm


def import_(
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH", help_behavior_hint="")],
    out: Path,
    weights: Maybe[Literal["raw", "ema"]] = None,
    tokenizer: Maybe[Path] = None,
    model: MaybeMethod = None,
    alpha_0: Maybe[float] = None,
    block_size: Maybe[int] = None,
    length: Maybe[int] = None,
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
) -> None:
    """Turn a model of the papers' authors into a checkpoint: a training file (Eso-LM, MDLM, BD3-LM, AR) or a folder as
    published (BD3-LM, MDLM). Nothing in the file is run.

    Examples:

      esolm import last.ckpt --out runs/theirs
      esolm import last.ckpt --weights raw --out runs/theirs-raw
      esolm import bd3lm-owt-block_size16/ --tokenizer gpt2/ --out runs/bd3lm
      esolm import kuleshov-group/bd3lm-owt-block_size16 --tokenizer gpt2/ --out runs/bd3lm
      esolm import old.ckpt --model esolm-b --alpha-0 0.25 --length 1024 --out runs/old

    In Python:

      from esolm.importers import import_model

      found = import_model("last.ckpt", "runs/theirs")
      model = esolm.load(found.path)

    Args:
        path: A training file, or a folder with safetensors and config.json, here or by its name on the Hub.
        out: Folder for the checkpoint.
        weights: Of a training file; left out, the averaged ones (ema) where there are any.
        tokenizer: Its file or folder (tokenizer.json; encoder.json and vocab.bpe; vocab.json and merges.txt); left
            out, that of the file.
        model: The method, where the file does not say.
        alpha_0: Eso-LM: share that diffusion writes, where the file does not say.
        block_size: BD3-LM: tokens of a block, where the file does not say.
        length: Tokens of a text, where the file does not say.
        json: Print what was found as JSON.
    """
    from esolm.importers import import_model

    method = _method(model, alpha_0, block_size)
    found = import_model(path, out, weights=weights, tokenizer=tokenizer, algorithm=method, length=length)
    if json:
        print_json({**found.told, "saved": str(found.path)})
        return
    width = max(map(len, found.told))
    for label, value in found.told.items():
        print(f"{label:<{width}}  {value}")
    print(f"{'saved':<{width}}  {found.path}")


def _method(model: str | None, alpha_0: float | None, block_size: int | None) -> "Algorithm | None":
    """The method that the options name. ValueError where they do not name all of it: nothing is taken for granted."""
    from esolm import recipes

    if model is None:
        if alpha_0 is not None or block_size is not None:
            raise ValueError("--alpha-0 and --block-size go with --model, where a file does not say its method")
        return None
    found = recipes.method(model, alpha_0, block_size)
    for name, needed, option in (("esolm", alpha_0, "--alpha-0"), ("bd3lm", block_size, "--block-size")):
        if model.startswith(name) and needed is None:
            raise ValueError(f"--model {model} needs {option}, which the file does not say")
    return found
