"""Methods from outside the package: classes of a Python file or module that the user names.

A checkpoint records its method by the name of the class and never says where its code lies: it is data, and loading it
runs nothing of its own. So whoever reads such a checkpoint brings the class along: `import` in Python, `--with FILE` on
the command line. Nothing is searched for and nothing is registered; a class that derives from `Algorithm` is known.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from esolm import plain
from esolm.algorithms.algorithm import Algorithm

_HERE = "esolm."


def bring(place: str) -> ModuleType:
    """Run a Python file ("my_method.py") or import a module ("package.module"), so that its methods are known by name.

    ValueError, in one line, if it is not there or fails.
    """
    is_file = place.endswith(".py") or "/" in place
    if is_file and not Path(place).is_file():
        raise ValueError(
            f"there is no file {place} to take methods from: name a Python file, or a module that is installed"
        )
    try:
        return _run(Path(place)) if is_file else importlib.import_module(place)
    except Exception as problem:
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == place]
        line = problem.lineno if isinstance(problem, SyntaxError) else lines[-1] if lines else None
        at = place if line is None else f"{place}, line {line}"
        raise ValueError(f"{at}: {type(problem).__name__}: {problem}") from problem


def names() -> list[str]:
    """The methods from outside that are known now."""
    return sorted(_known())


def method(name: str) -> Algorithm:
    """The method of a class from outside, with its defaults. ValueError if it is not known or needs more."""
    classes = _known().get(name, [])
    if len(classes) != 1:
        homes = " and ".join(sorted(cls.__module__ for cls in classes))
        raise ValueError(f"{name} is defined in {homes}: rename one of them" if classes else f"{name} is not known")
    try:
        made = classes[0]()
    except TypeError as problem:
        raise ValueError(f"{name} cannot be made without options ({problem}): give its fields defaults") from None
    assert isinstance(made, Algorithm)
    return made


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError if the method that a checkpoint's configuration names is not known, and say how to bring it."""
    algorithm = config.get("algorithm")
    name = algorithm.get("type") if isinstance(algorithm, dict) else None
    if isinstance(name, str) and name not in plain.concrete([Algorithm]):
        raise ValueError(
            f"this checkpoint's method is {name[:60]!r}, which is not one of esolm's: name the file or module that defines "
            "it with --with (esolm COMMAND ... --with FILE.py), or import it first in Python; a checkpoint never runs code"
        )


def _known() -> dict[str, list[type]]:
    found = plain.concrete([Algorithm]).items()
    return {
        name: kept for name, classes in found if (kept := [c for c in classes if not c.__module__.startswith(_HERE)])
    }


def _run(path: Path) -> ModuleType:
    """The file as a module, under a name that hides no other module."""
    name = f"with_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
