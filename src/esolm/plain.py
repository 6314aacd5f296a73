"""Frozen dataclasses <-> plain data (what JSON can hold), strictly and with errors that teach.

The configuration is the object: a checkpoint records `to_plain(config)` and `from_plain(Config, data)`
gives an equal object back or lists all that is wrong at once: key path, what was expected, the nearest right key.

A value whose class derives from an abstract dataclass carries a `"type": "<ClassName>"` key and is resolved
among the concrete subclasses the process knows, so a class of the user's own needs no registry.

Fields may be bool, int, float, str, None, Path, Literal, tuple, dataclass, unions of these; no list, dict or tensor.
"""

import dataclasses
import difflib
import inspect
import itertools
import json
import math
import re
import reprlib
import sys
import types
import typing
from abc import ABC
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

MAX_DEPTH = 64

T = TypeVar("T")


def to_plain(obj: object) -> Any:
    """The plain data of a dataclass (or of a tuple or scalar), such that `from_plain` gives an equal one.

    Raises ValueError for a number that is not finite and TypeError for a value no JSON holds, naming the key.
    """
    return _lower(obj, (), tagged=False)


def from_plain(cls: type[T], data: object) -> T:
    """The `cls` that `data` describes. Keys with a default may be left out; unknown keys are refused.

    Raises one ValueError that lists every problem, a line each: `algorithm.alpha_0: expected float, got 'x'`.
    """
    problems: list[str] = []
    value = _raise(cls, data, (), problems)
    if problems:
        raise ValueError(_listing(problems))
    return cast("T", value)


def replace(obj: T, changes: Mapping[str, object]) -> T:
    """A copy of a dataclass with changed keys, dotted where nested: `{"algorithm.alpha_0": 0.5}`.

    Changing a `type` key starts from that type's defaults. Values may be plain data or dataclasses.
    Raises one ValueError that lists every unknown key (with the nearest right one) and every bad value.
    """
    data = to_plain(obj)
    problems: list[str] = []
    for key in sorted(changes, key=_outer_first):
        try:
            _assign(data, type(obj), key, changes[key])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(_listing(problems))
    return from_plain(type(obj), data)


def parse(text: str, *, depth: int = MAX_DEPTH) -> Any:
    """The data of a JSON text. Raises ValueError for bad syntax, a repeated key, NaN or an infinity, and more
    than `depth` levels of nesting (told before anything is parsed, so a hostile text costs nothing)."""
    level = 0
    for token in _BRACKETS.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if level > depth:
            raise ValueError(f"JSON is nested more than {depth} levels deep at character {token.start()}")
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def render(data: object) -> str:
    """Canonical JSON text of plain data: keys in the order given, two spaces of indent, a final newline.

    Raises ValueError for NaN, an infinity, or data that JSON cannot hold.
    """
    try:
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not plain data: {error}; allowed are dict, list, str, int, float, bool, None") from None


def classes(cls: type[T]) -> dict[str, type[T]]:
    """The concrete dataclasses below an abstract one, by name; of two of one name none, since a name must say which."""
    return {name: found[0] for name, found in _concrete([cls]).items() if len(found) == 1}


class FileError(ValueError):
    """A file that somebody named is missing or damaged; the call was right."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`"; did you mean 'alpha_0'?"`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


# A string (also one that never ends, so that the scan is linear), or one bracket.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_FAILED = object()
_SCALARS = (bool, int, float, str)
_KeyPath = tuple[str, ...]


def _listing(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])


def _at(path: _KeyPath, message: str) -> str:
    return f"{'.'.join(path)}: {message}" if path else message


def _shown(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


# -- objects to data ---------------------------------------------------------------------------------------


def _lower(value: object, path: _KeyPath, *, tagged: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        data: dict[str, Any] = {"type": type(value).__name__} if tagged or _abstract_above(type(value)) else {}
        for name in _fields(type(value)):
            ambiguous = len(_dataclasses_in(hints[name])) > 1
            data[name] = _lower(getattr(value, name), (*path, name), tagged=ambiguous)
        return data
    if isinstance(value, tuple | list):
        return [_lower(item, (*path, str(i)), tagged=tagged) for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, _SCALARS):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(_at(path, f"must be finite, got {value}"))
        return float(value) if isinstance(value, float) else value
    raise TypeError(_at(path, f"{type(value).__name__} is not plain data: {_shown(value)}"))


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _is_abstract(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and (inspect.isabstract(cls) or ABC in cls.__bases__)


def _abstract_above(cls: type) -> bool:
    return any(_is_abstract(above) for above in cls.__mro__[1:])


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for inner in typing.get_args(hint) for cls in _dataclasses_in(inner)]


# -- data to objects ---------------------------------------------------------------------------------------


def _raise(hint: Any, data: object, path: _KeyPath, problems: list[str]) -> object:
    """The value of type `hint` that `data` describes, or `_FAILED` with the reasons added to `problems`."""
    origin = typing.get_origin(hint)
    if len(path) > MAX_DEPTH:
        problems.append(_at(path[:3], f"nested more than {MAX_DEPTH} levels deep"))
        return _FAILED
    if hint is Any or hint is object:
        return data
    if origin in (Union, types.UnionType):
        return _raise_union(hint, data, path, problems)
    if origin is Literal:
        return _raise_literal(hint, data, path, problems)
    if origin is tuple or hint is tuple:
        return _raise_tuple(hint, data, path, problems)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _raise_dataclass(hint, data, path, problems)
    return _raise_scalar(hint, data, path, problems)


def _raise_scalar(hint: Any, data: object, path: _KeyPath, problems: list[str]) -> object:
    if hint is None or hint is type(None):
        if data is None:
            return None
    elif hint is Path:
        if isinstance(data, str | Path):
            return Path(data)
    elif hint is float:
        if isinstance(data, int | float) and not isinstance(data, bool):
            if abs(data) <= sys.float_info.max:
                return float(data)
            problems.append(_at(path, f"must be finite, got {_shown(data)}"))
            return _FAILED
    elif hint in _SCALARS:
        if type(data) is hint:
            return data
    else:
        raise TypeError(_at(path, f"a field of type {hint} cannot be read from plain data"))
    problems.append(_at(path, f"expected {_named(hint)}, got {_shown(data)}"))
    return _FAILED


def _raise_literal(hint: Any, data: object, path: _KeyPath, problems: list[str]) -> object:
    choices = typing.get_args(hint)
    for choice in choices:
        if type(choice) is type(data) and choice == data:
            return data
    hinted = nearest(data, [c for c in choices if isinstance(c, str)]) if isinstance(data, str) else ""
    problems.append(_at(path, f"expected {_named(hint)}, got {_shown(data)}{hinted}"))
    return _FAILED


def _raise_tuple(hint: Any, data: object, path: _KeyPath, problems: list[str]) -> object:
    inner = typing.get_args(hint)
    if not isinstance(data, list | tuple):
        problems.append(_at(path, f"expected {_named(hint)}, got {_shown(data)}"))
        return _FAILED
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(data)
    if len(inner) != len(data):
        problems.append(_at(path, f"expected {len(inner)} items ({_named(hint)}), got {len(data)}"))
        return _FAILED
    pairs = enumerate(zip(inner, data, strict=True))
    items = [_raise(kind, item, (*path, str(i)), problems) for i, (kind, item) in pairs]
    return _FAILED if any(item is _FAILED for item in items) else tuple(items)


def _raise_union(hint: Any, data: object, path: _KeyPath, problems: list[str]) -> object:
    members = typing.get_args(hint)
    classes = [kind for kind in members if isinstance(kind, type) and _dataclasses_in(kind)]
    if len(classes) > 1 and (isinstance(data, dict) or dataclasses.is_dataclass(data)):
        return _raise_tagged(classes, data, path, problems)
    if isinstance(data, dict) and classes:
        return _raise(classes[0], data, path, problems)
    for member in sorted(members, key=lambda member: member is not type(data)):
        value = _raise(member, data, path, [])
        if value is not _FAILED:
            return value
    problems.append(_at(path, f"expected {_named(hint)}, got {_shown(data)}"))
    return _FAILED


def _raise_dataclass(cls: type, data: object, path: _KeyPath, problems: list[str]) -> object:
    if type(data) is cls:
        return data
    if _is_abstract(cls):
        return _raise_tagged([cls], data, path, problems)
    if not isinstance(data, dict):
        problems.append(_at(path, f"expected {_named(cls)} (its keys and values), got {_shown(data)}"))
        return _FAILED
    keys = dict(data)
    if "type" not in _fields(cls) and keys.pop("type", cls.__name__) != cls.__name__:
        problems.append(_at((*path, "type"), f"expected {cls.__name__!r}, got {_shown(data['type'])}"))
        return _FAILED
    before = len(problems)
    hints = typing.get_type_hints(cls)
    values = _raise_fields(cls, hints, keys, path, problems)
    problems.extend(_unknown(cls, str(key), path) for key in keys if key not in _fields(cls))
    if len(problems) > before:
        return _FAILED
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(_at(path, str(error)))
        return _FAILED


def _raise_fields(
    cls: type, hints: dict[str, Any], keys: dict[str, object], path: _KeyPath, problems: list[str]
) -> dict[str, object]:
    values = {}
    for field in dataclasses.fields(cls):
        if field.init and field.name in keys:
            values[field.name] = _raise(hints[field.name], keys[field.name], (*path, field.name), problems)
        elif field.init and field.default is field.default_factory is dataclasses.MISSING:
            problems.append(_at((*path, field.name), f"missing; expected {_named(hints[field.name])}"))
    return values


def _raise_tagged(classes: list[type], data: object, path: _KeyPath, problems: list[str]) -> object:
    """A dataclass chosen by its `type` key among `classes` and, of the abstract ones, their subclasses."""
    known = _concrete(classes)
    names = ", ".join(sorted(known))
    if any(type(data) in candidates for candidates in known.values()):
        return data
    if not isinstance(data, dict):
        problems.append(_at(path, f"expected one of {names} (with its keys), got {_shown(data)}"))
        return _FAILED
    name = data.get("type")
    if name is None:
        problems.append(_at((*path, "type"), f"missing; expected one of {names}"))
    elif not isinstance(name, str) or name not in known:
        hinted = nearest(str(name), known)
        problems.append(_at((*path, "type"), f"expected one of {names}, got {_shown(name)}{hinted}"))
    elif len(known[name]) > 1:
        homes = " and ".join(sorted({cls.__module__ for cls in known[name]}))
        problems.append(_at((*path, "type"), f"{name} is defined in {homes}; rename one of them"))
    else:
        return _raise_dataclass(known[name][0], data, path, problems)
    return _FAILED


def _concrete(classes: list[type]) -> dict[str, list[type]]:
    """Concrete dataclasses by name; of two definitions of one class (a module reloaded) the later counts."""
    found: dict[tuple[str, str], type] = {}
    for cls in classes:
        if not _is_abstract(cls) and dataclasses.is_dataclass(cls):
            found[cls.__module__, cls.__qualname__] = cls
        for below in _concrete(cls.__subclasses__()).values() if _is_abstract(cls) or _abstract_above(cls) else ():
            found.update({(each.__module__, each.__qualname__): each for each in below})
    named: dict[str, list[type]] = {}
    for cls in found.values():
        named.setdefault(cls.__name__, []).append(cls)
    return named


def _unknown(cls: type, key: str, path: _KeyPath) -> str:
    names = _fields(cls)
    keys = f" (keys of {cls.__name__}: {', '.join(names) or 'none'})"
    return _at((*path, key[:60]), f"unknown key{nearest(key, names) or keys}")


def _named(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_named(member) for member in typing.get_args(hint))
    if hint is None or hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


# -- changes -----------------------------------------------------------------------------------------------


def _outer_first(key: str) -> tuple[int, bool]:
    """Outer keys before inner ones, and a `type` before its neighbours, as both replace what lies below."""
    return key.count("."), not key.endswith(".type")


def _assign(data: dict[str, Any], cls: type, key: str, value: object) -> None:
    """Set one dotted key in the plain data of a `cls`; raises ValueError for a key that is not there."""
    *outer, last = key.split(".")
    for depth, name in enumerate(outer):
        inside = _dataclasses_in(_hint(cls, name, tuple(outer[:depth])))
        if dataclasses.is_dataclass(data.get(name)) or data.get(name) is None:
            data[name] = {} if data.get(name) is None else _lower(data[name], (), tagged=True)
        if not inside or not isinstance(data[name], dict):
            raise ValueError(_at(tuple(outer[: depth + 1]), f"has no keys inside, so no {last!r}"))
        data = data[name]
        named = _concrete(inside).get(str(data.get("type")), inside)
        cls = named[0]
    if last == "type" and (_is_abstract(cls) or _abstract_above(cls)):
        data.clear()
    elif not _is_abstract(cls):
        _hint(cls, last, tuple(outer))
    data[last] = value


def _hint(cls: type, name: str, path: _KeyPath) -> Any:
    if name not in _fields(cls):
        raise ValueError(_unknown(cls, name, path))
    return typing.get_type_hints(cls)[name]


# -- reading JSON ------------------------------------------------------------------------------------------


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, following in itertools.pairwise(keys) if key == following)
        raise ValueError(f"key {_shown(twice)} appears twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON allows; numbers must be finite")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a float; numbers must be finite")
    return value
