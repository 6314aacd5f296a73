"""`esolm push` and `esolm export`."""

import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from esolm.cli.parsing import Checkpoint, Flag, Maybe
from esolm.cli.terminal import say


def push(
    checkpoint: Checkpoint,
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME", help_behavior_hint="")],
    private: Flag = False,
    revision: Maybe[str] = None,
    license: Maybe[str] = None,
    optimizer: Flag = False,
    dry_run: Flag = False,
) -> None:
    """Put a checkpoint on the Hugging Face Hub, with a card filled from its run (needs the extra hub, and HF_TOKEN).

    Examples:

      esolm push runs/first owner/first --license apache-2.0
      esolm push runs/first owner/first --private --revision trial
      esolm push runs/first owner/first --dry-run

    In Python:

      with tempfile.TemporaryDirectory() as folder:
          share.pack("runs/first", Path(folder), "owner/first", licence="apache-2.0")

    Args:
        checkpoint: A run's folder or one step of it.
        name: The repository; made if there is none. Read it with: esolm sample OWNER/NAME.
        private: Make it private, if it is made.
        revision: A branch, made if there is none; left out, main.
        license: Of the weights, for the card.
        optimizer: Also all that training needs to go on, the names of its data too (no folders); left out, the averaged
            weights alone, which write and score.
        dry_run: Show the card and the files, and put nothing anywhere.
    """
    from esolm import hub, share

    with tempfile.TemporaryDirectory() as place:
        folder = share.pack(checkpoint, Path(place), name, licence=license, whole=optimizer)
        if dry_run:
            print((folder / hub.CARD).read_text(encoding="utf-8"))
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
            return
        address = hub.push(folder, name, private=private or None, revision=revision)
    say(f"{checkpoint} is at {address}; write with it: esolm sample {name}{f'@{revision}' if revision else ''}")


def export(checkpoint: Checkpoint, out: Path) -> None:
    """Write one step of the network as a program of torch, to be run where esolm is not installed.

    Examples:

      esolm export runs/first --out step.pt2

    In Python:

      from esolm.export import export

      program = export("runs/first", "step.pt2")

    Args:
        checkpoint: A run's folder or one step of it.
        out: File for the program; torch.export.load reads it.
    """
    from esolm.export import export as write

    write(checkpoint, out)
    say(f"{out} holds one step in float32, of any number of texts, rows (2 or more) and cached rows")
