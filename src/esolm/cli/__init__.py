"""The command line: each command a function of a few lines over the Python call of equal power.

torch is imported inside the commands, so that `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong use,
3 data or a checkpoint is missing or damaged, 75 stopped by a signal after saving (go on with --resume), 130 Ctrl-C.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import tyro

from esolm import __version__
from esolm.cli.learning import tokenize, train
from esolm.cli.measuring import demo, evaluate, info, verify
from esolm.cli.writing import infill, sample

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
