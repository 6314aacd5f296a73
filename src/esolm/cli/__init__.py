"""The command line: each command a function of a few lines over the Python call of equal power.

torch is imported inside the commands, so that `--help` answers at once. Exit codes: 0 done; 1 failed; 2 wrong use;
3 data, a checkpoint or a file is missing, damaged or cannot be written; 75 stopped by a signal after saving (go on with
--resume); 130 Ctrl-C and 143 SIGTERM where there was nothing to save.
"""

import errno
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial

from esolm import __version__, signals
from esolm.cli.importing import import_
from esolm.cli.judging import family, frontier, judge
from esolm.cli.learning import tokenize, train
from esolm.cli.measuring import demo, evaluate, info, verify
from esolm.cli.parsing import call_of, fail, summary
from esolm.cli.planning import plan
from esolm.cli.sharing import export, push
from esolm.cli.terminal import tell_log
from esolm.cli.timing import bench, bench_training
from esolm.cli.watching import plot, runs
from esolm.cli.writing import infill, sample

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "tokenize": tokenize,
    "plan": plan,
    "sample": sample,
    "infill": infill,
    "evaluate": evaluate,
    "judge": judge,
    "frontier": frontier,
    "family": family,
    "import": import_,
    "info": info,
    "runs": runs,
    "plot": plot,
    "verify": verify,
    "push": push,
    "export": export,
    "bench": bench,
    "bench-training": bench_training,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of the user are one line on stderr, and an exit code."""
    name, *rest = defined(sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name == "help":
        name, rest = [*rest, "--help"][0], ["--help"]
    if name in ("--version", "-V"):
        print(f"esolm {__version__}")
    elif name in ("", "--help", "-h"):
        print(_overview())
        sys.exit(0 if name else 2)
    elif name not in _COMMANDS:
        _refuse(name)
    else:
        call = call_of(_COMMANDS[name], name, rest)
        if "--json" not in rest:
            tell_log()
        run(call)


def defined(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--with FILE`, which defines methods of the user's own, wherever it stands."""
    words = list(arguments)
    while "--with" in words:
        at = words.index("--with")
        if at + 1 == len(words):
            fail("--with needs a value: a Python file or a module that defines a method", 2)
        _, source = words.pop(at), words.pop(at)
        from esolm.own import define

        run(partial(define, source))
    return words


def run(call: Callable[[], None]) -> None:
    """Make a call, and end with a line and an exit code where it fails."""
    try:
        with warnings.catch_warnings(), signals.leaving():
            warnings.showwarning = _warn  # type: ignore[assignment]
            call()
            sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", signals.INTERRUPTED)
    except signals.Terminated:
        fail("terminated", signals.TERMINATED)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written nowhere, on exit too
        sys.exit(0)
    except (ValueError, ArithmeticError, OSError) as problem:
        fail(_told(problem), _exit_code(problem))
    except (MemoryError, RuntimeError) as problem:
        if not isinstance(problem, MemoryError) and "memory" not in str(problem):
            raise  # a bug: where it happened is what helps
        from esolm.memory import TooLarge

        if isinstance(problem, TooLarge):
            fail(str(problem), 1)
        fail("out of memory: choose a smaller network, batch (micro_batch, in training) or text", 1)


def _overview() -> str:
    width, column = min(shutil.get_terminal_size().columns, 100), max(map(len, _COMMANDS)) + 3
    lines = ["usage: esolm COMMAND [OPTIONS]", "", *textwrap.wrap(_DESCRIPTION, width), ""]
    for name, command in _COMMANDS.items():
        told = textwrap.wrap(summary(command), width - column)
        lines += [f"  {name}".ljust(column) + told[0], *(" " * column + line for line in told[1:])]
    return "\n".join([*lines, "", *textwrap.wrap(_SEE, width)])


_DESCRIPTION = "Language models between autoregression and masked diffusion: train, evaluate, sample."
_SEE = (
    "Begin with: esolm demo. Each command has examples and the Python call of equal power: esolm COMMAND --help. "
    "A method of your own: esolm --with FILE COMMAND (docs/adding-a-model.md). The version: esolm --version."
)


def _refuse(name: str) -> None:
    from esolm.plain import nearest

    what, names = ("option", ["--help", "--version"]) if name.startswith("-") else ("command", list(_COMMANDS))
    fail(f"there is no {what} {name!r}{nearest(name, names)}; there are {', '.join(names)}", 2)


def _exit_code(problem: Exception) -> int:
    from esolm.checkpoint import CheckpointError
    from esolm.corpus import DataError
    from esolm.plain import FileError

    if isinstance(problem, ChildProcessError):  # another rank's end
        return 1
    if isinstance(problem, CheckpointError | DataError | FileError | OSError):
        return 3
    return 2 if isinstance(problem, ValueError) else 1


def _told(problem: Exception) -> str:
    """The message of an error; of the system's own, the file and the reason."""
    if isinstance(problem, OSError) and problem.strerror:
        place = f"{problem.filename}: " if problem.filename else ""
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space or choose another place" if full else "choose another place or make it writable"
        return f"{place}{problem.strerror[0].lower()}{problem.strerror[1:]}; {remedy}"
    return str(problem)


def _warn(message: Warning | str, *_: object) -> None:
    print(f"esolm: warning: {message}", file=sys.stderr)
