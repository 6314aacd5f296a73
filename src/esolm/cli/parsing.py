"""Arguments of one command to a call of it: what is wrong with them is one line on stderr and exit code 2.

tyro reads the signature and writes the help. Its boxes of errors become lines here, and an unknown option names the
nearest right one. Types are read the same way everywhere. It runs no command.
"""

import contextlib
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]  # an option that may be left out
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Words = Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT", help_behavior_hint="")]
DtypeName = Literal["auto", "float32", "float16", "bfloat16", "int8"]
MethodName = Annotated[str, tyro.conf.arg(metavar="{ar,mdlm,bd3lm,esolm-a,esolm-b,CLASS}")]  # CLASS: see own.py
MaybeMethod = Annotated[
    str | None, tyro.conf.arg(metavar="{ar,mdlm,bd3lm,esolm-a,esolm-b,CLASS}", help_behavior_hint="")
]
MethodNames = Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")]

_KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
_REGISTRY = ConstructorRegistry()


def call_of(command: Callable[..., None], name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """The call of a command that its arguments ask for. SystemExit after `--help` (0) and for mistakes (2)."""

    @functools.wraps(command)
    def later(*values: object, **named: object) -> Callable[[], None]:
        return functools.partial(command, *values, **named)

    # tyro would read the docstring of what is wrapped, and end a line of the help where that has ended one
    del vars(later)["__wrapped__"]
    vars(later)["__signature__"] = inspect.signature(command)
    later.__doc__ = re.sub("\n {12,}", " ", command.__doc__ or "")
    prog = f"esolm {name}"
    if not {"-h", "--help"} & set(arguments):
        _refuse_unknown(command, prog, arguments)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                cast("Callable[..., Callable[[], None]]", later),
                prog=prog,
                description=summary(command, whole=True),
                args=list(arguments),
                config=_CONFIG,
                registry=_REGISTRY,
            )
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        fail(f"{_one_line(box.getvalue())}; see {prog} --help", 2)


def summary(command: Callable[..., None], *, whole: bool = False) -> str:
    """What a command's docstring says of it: its first paragraph, or all that stands before its arguments."""
    told = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0].strip()
    first, _, rest = told.partition("\n\n")
    first = " ".join(first.split())
    if not whole:
        return first
    # tyro joins lines but those that are indented, and makes two of an empty line before such a one
    first = textwrap.fill(first, shutil.get_terminal_size().columns, subsequent_indent="  ")
    return f"{first}\n\n" + re.sub("\n\n(?= )", "\n", rest)


def fail(message: str, code: int) -> NoReturn:
    """End with one message on stderr."""
    print(f"esolm: {message}", file=sys.stderr)
    sys.exit(code)


@_REGISTRY.primitive_rule
def _plain_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, texts and paths, and the same or None, with an error that says what was expected."""
    inside = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    kinds = [kind for kind in inside if kind is not NoneType]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal and NoneType in inside:
        return _one_of(get_args(kinds[0]))
    if len(kinds) != 1 or kinds[0] not in _KINDS:
        return None
    kind: Callable[[str], object] = kinds[0]

    def read(words: list[str]) -> object:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"expected {_KINDS[kinds[0]]}, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kinds[0].__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, inside) or (kinds[0] is float and isinstance(value, int)),
        str_from_instance=lambda value: [str(value)],
    )


def _one_of(words: tuple[str, ...]) -> PrimitiveConstructorSpec[Any]:
    """One of some words, or None if it is left out."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        choices=words,
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in words,
        str_from_instance=lambda value: [str(value)],
    )


def _refuse_unknown(command: Callable[..., None], prog: str, arguments: Sequence[str]) -> None:
    """An option that is not there, before tyro says so without the nearest one."""
    from esolm.plain import nearest

    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    given = [name for word in options if re.match("--?[a-zA-Z]", name := word.partition("=")[0])]
    if not given:
        return
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        tyro.cli(command, prog=prog, args=["--help"], config=_CONFIG, registry=_REGISTRY)
    known = ["-h", "--help", *re.findall(r"^\W*(--[\w-]+)", told.getvalue(), re.MULTILINE)]
    for name in given:
        if name.replace("_", "-") not in known:
            fail(f"there is no option {name}{nearest(name, known)}; see {prog} --help", 2)
    several = re.findall(r"^\W*(--[\w-]+) (?:\[|\S+ \.\.\.)", told.getvalue(), re.MULTILINE)  # --length [INT [INT ...]]
    for name, word in itertools.zip_longest(options, options[1:], fillvalue="--"):
        if name.replace("_", "-") in several and word.startswith("--"):
            hint = (
                "KEY=VALUE, as in --set network.width=512; --set help lists the keys" if name == "--set" else "a value"
            )
            fail(f"{name} needs {hint}; see {prog} --help", 2)


def _one_line(box: str) -> str:
    """What an error box of tyro says, without its frame and its hints (the frame differs where there is no Unicode)."""
    from esolm.plain import nearest

    title, *lines = re.sub("\x1b\\[[0-9;]*m", "", box).splitlines() or [""]
    lines = [line[1:].rstrip().removesuffix("│").rstrip() for line in lines]  # no right side without Unicode
    end = next((n for n, line in enumerate(lines) if line.strip().startswith(_HINTS)), len(lines))
    said = " ".join(line.strip() for line in lines[:end] if line.strip(" ─-"))
    if "Required options" in title:
        return f"missing {' and '.join(line.strip() for line in lines[:end] if re.match(' {5}[^ ]', line))}"
    if found := re.match("Missing value for argument '(.*?)'", said):
        return f"{found[1]} needs a value"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*?)'. Expected one of \((.*)\)", said):
        choices = re.findall("'(.*?)'", found[3])
        return f"{found[2]} is one of {', '.join(choices)}, got {found[1]!r}{nearest(found[1], choices)}"
    if found := re.match(r"Error parsing (.*): Could not find valid parse for arguments: \[(.*)\]", said):
        kind = next((told for word, told in _SEVERAL.items() if f"[{word} " in box), "other values")
        return f"{found[1]}: expected {kind}, got {found[2]}"
    return said.replace("Unrecognized options:", "there is no place for").removeprefix("Error parsing ")


_SEVERAL = {"INT": "whole numbers", "FLOAT": "numbers"}
_HINTS = ("For full helptext", "Argument helptext", "Got errors")
