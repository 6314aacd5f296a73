"""What all commands share: where words go, which device, and the model of a checkpoint."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esolm.cli.parsing import DtypeName

if TYPE_CHECKING:
    from rich.console import Console

    from esolm.model import Model


def say(message: str) -> None:
    print(message, file=sys.stderr)


def tell_log() -> None:
    """From now on a terminal is told what modules log: that something is compiled, why something is slower."""
    import logging

    if sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("esolm: %(message)s"))
        log = logging.getLogger("esolm")
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)


def print_json(data: object) -> None:
    print(json.dumps(data, ensure_ascii=False))


def console(*, stderr: bool = True) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def bars() -> "Console":
    """Where bars of progress go: the terminal, and nowhere if standard error is none."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty())


def device_of(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).is_meta:
            raise ValueError("it holds no numbers")
    except (RuntimeError, AssertionError, ValueError):
        raise ValueError(f"there is no device {name!r} here: use cpu, or auto") from None
    return name


def refuse_unwritable(folder: Path) -> None:
    """Raise OSError before any work is done if a folder cannot be made or written. It makes nothing."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def loaded(path: Path, dtype: DtypeName, device: str) -> "Model":
    from esolm.model import load

    return load(path, dtype=dtype, device=device_of(device))
