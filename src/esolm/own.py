"""Methods of one's own: a file or a module that defines them, named by the user and by nobody else.

    esolm --with cosine.py train --model CosineMDLM ...        own.define("cosine.py")

Defining a subclass of `Algorithm` is all there is to do; what is defined is found by its name. A checkpoint records
that name and never a place: it is data, so it is not let say what code to run.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

_PREFIX = "esolm_own_"  # of modules made of files


def define(source: str) -> None:
    """Run a Python file (by its path) or import a module (by its name). ValueError, with what went wrong and in which
    line, if it is not there or cannot be run."""
    path = Path(source)
    try:
        if path.suffix == ".py":
            _run(path)
        else:
            importlib.import_module(source)
    except FileNotFoundError:
        raise ValueError(f"there is no file {source}: --with takes a Python file or the name of a module") from None
    except ModuleNotFoundError as problem:
        remedy = "install it, or give a file that ends in .py"
        raise ValueError(f"--with {source}: there is no module {problem.name}; {remedy}") from None
    except Exception as problem:  # whatever a file of the user's does wrong
        raise ValueError(
            f"--with {source} cannot be run: {type(problem).__name__}: {problem}{_line(problem)}"
        ) from problem


def _run(path: Path) -> None:
    """As a module of the file's name, so that two files may define methods and each is run once."""
    name = f"{_PREFIX}{path.stem}"
    if not path.is_file():
        raise FileNotFoundError(path)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)


def _line(problem: BaseException) -> str:
    """The line of the user's file where a problem came up."""
    if isinstance(problem, SyntaxError):
        return ""  # it says so itself
    trace, last = problem.__traceback__, None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return "" if last is None else f" (line {last.tb_lineno} of {Path(last.tb_frame.f_code.co_filename).name})"


def source(cls: type) -> str | None:
    """What to give `define` in another process so that this class is known there too; None for one of the package."""
    module = sys.modules[cls.__module__]
    if cls.__module__.partition(".")[0] == "esolm":
        return None
    return str(module.__file__) if cls.__module__.startswith(_PREFIX) else cls.__module__
