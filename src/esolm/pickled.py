"""A pickle read as data: an interpreter of its opcodes that builds plain containers, calls nothing and imports nothing.

    GLOBAL 'omegaconf.dictconfig DictConfig'  ->  Named("omegaconf.dictconfig.DictConfig"), a name and no more
    REDUCE, NEWOBJ, NEWOBJ_EX                 ->  a container or what `builders` make, else Inert(name, arguments)
    BUILD                                     ->  Inert.state

Python's own unpickler calls what a file names, so that a list of allowed names is one mistake away from a shell, and it
sets memory aside as the file asks. Here there is no call to guard: only the opcodes that a pickler writes in protocols
2 to 5 are known, and their number, the file's size and the numbers in it have limits.

A name that only a hostile file needs (most of the standard library, functions of torch) ends the reading with a line,
though it could do nothing. It knows no tensors: archive.py gives `builders` and `persistent`.
"""

import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Builder = Callable[[tuple[Any, ...]], object]

LARGEST = 32 * 2**20  # bytes of a pickle: those of training files have a few hundred thousand
_OPCODES = 1_500_000  # those of a file with GPT-2's tokenizer in plain Python: six hundred thousand
_DIGITS = 255  # bytes of a whole number
_KEY = 2**60  # of a whole number that is a key: larger ones can be chosen to have one hash


class PickleError(ValueError):
    """A pickle is damaged, hostile or not of the kind that training files hold. The message says what and where."""


@dataclass(frozen=True, slots=True)
class Named:
    """A global of a pickle: its name. Nothing was imported."""

    name: str


@dataclass(eq=False, slots=True)
class Inert:
    """What a pickle would have made by calling `name`: its arguments, its state, its items. Nothing was called."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: object = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


def read(data: bytes, builders: Mapping[str, Builder], persistent: Callable[[object], object]) -> tuple[Any, set[str]]:
    """What a pickle holds, and the names it needs that were left as they are.

    `builders` make values of arguments in place of the call of a name; `persistent` makes one of a persistent id.
    PickleError if it is damaged, too large, or names what only a hostile file would.
    """
    if len(data) > LARGEST:
        raise PickleError(f"the pickle has {len(data):,} bytes, at most {LARGEST:,} are read")
    machine = _Machine(data, {**_CONTAINERS, **builders}, persistent)
    try:
        return machine.run(), machine.inert
    except PickleError as problem:
        raise PickleError(f"{problem} (byte {machine.at:,} of the pickle)") from None
    except (IndexError, struct.error):
        raise PickleError(f"the pickle ends too early, or takes what is not there (byte {machine.at:,})") from None
    except UnicodeDecodeError:
        raise PickleError(f"the pickle holds text that is not UTF-8 (byte {machine.at:,})") from None


# -- names -------------------------------------------------------------------------------------------------

_TYPES = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
_STANDARD = {  # of Python's own library; everything else in it is refused
    "__builtin__": f"{_TYPES} long unicode xrange",  # int, str and range, as protocol 2 calls them
    "_codecs": "encode",
    "_operator": "getitem",  # Dict[str, Any]
    "argparse": "Namespace",
    "builtins": _TYPES,
    "collections": "Counter OrderedDict defaultdict deque",
    "copy_reg": "_reconstructor",
    "copyreg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "operator": "getitem",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "types": "SimpleNamespace",
    "typing": "Any Dict List Mapping Optional Sequence Tuple Union",
}
_PYTHON = sys.stdlib_module_names | {"__builtin__", "cPickle", "commands", "copy_reg", "posixpath", "ntpath"}
_FUNCTIONS = re.compile(  # of torch and numpy: what makes values
    r"torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_\w+|device|b?float\w*|half|double|u?int\w*|long|short|bool|complex\w*|"
    r"strided|serialization\._get_layout|Size)|numpy\.(\w+\.)*(dtype|scalar|ndarray|_reconstruct|_frombuffer)"
)


def _refuse_hostile(module: str, name: str) -> None:
    """PickleError for a name that no training file needs. Nothing would have been run: this is to tell the user."""
    parts, root = name.split("."), module.partition(".")[0]
    if not all(part.isidentifier() for part in [*module.split("."), *parts]):
        raise PickleError(f"it names {module[:60]!r} {name[:60]!r}, which is no name")
    if root in _PYTHON:
        fine = name in _STANDARD.get(module, "").split()
    elif root in ("torch", "numpy"):
        fine = bool(_FUNCTIONS.fullmatch(f"{module}.{name}")) or all(part[0].isupper() for part in parts)
    else:
        fine = len(parts) == 1 or all(part[0].isupper() for part in parts)
    if not fine:
        full = f"{module}.{name}"[:80]
        raise PickleError(
            f"it names {full}, which no training file needs: it may be hostile, and nothing of it was run"
        )


# -- containers that are made by a call --------------------------------------------------------------------


def _empty_dict(arguments: tuple[Any, ...]) -> object:
    if all(isinstance(one, Named) for one in arguments) and len(arguments) <= 1:  # defaultdict(dict)
        return {}
    raise PickleError("a dictionary is made of something, not empty")


def _listed(arguments: tuple[Any, ...]) -> object:
    match arguments:
        case ():
            return []
        case (list() | tuple(),):
            return arguments[0]  # itself: copies could be many
    raise PickleError("a set or list is made of something that is no list")


def _encoded(arguments: tuple[Any, ...]) -> object:
    """Bytes, as protocol 2 writes them: text in Latin-1."""
    match arguments:
        case ():
            return b""
        case (str(text), "latin1" | "latin-1"):
            return Latin(text)
    raise PickleError("_codecs.encode with another encoding than latin1")


@dataclass(frozen=True, slots=True)
class Latin:
    """Bytes as text in Latin-1, one letter each; not turned into bytes before they are needed."""

    text: str


_CONTAINERS: dict[str, Builder] = {
    "__builtin__.bytes": _encoded,
    "__builtin__.dict": _empty_dict,
    "__builtin__.list": _listed,
    "__builtin__.set": _listed,
    "_codecs.encode": _encoded,
    "builtins.bytes": _encoded,
    "builtins.dict": _empty_dict,
    "builtins.list": _listed,
    "builtins.set": _listed,
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
}


# -- the machine -------------------------------------------------------------------------------------------


class _Machine:
    """The stack, the memo and the place in the file."""

    def __init__(self, data: bytes, builders: Mapping[str, Builder], persistent: Callable[[object], object]) -> None:
        self.data, self.builders, self.persistent = data, builders, persistent
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.inert: set[str] = set()

    def run(self) -> Any:
        for _ in range(_OPCODES):
            opcode = self.data[self.at]
            self.at += 1
            if opcode == _STOP:
                break
            step = _STEPS.get(opcode)
            if step is None:
                raise PickleError(f"opcode {opcode:#04x}, which no training file has")
            step(self)
        else:
            raise PickleError(f"more than {_OPCODES:,} opcodes")
        if len(self.stack) != 1 or self.marks or self.at != len(self.data):
            raise PickleError("the pickle does not end where it says")
        return self.stack[0]

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def counted(self, form: struct.Struct) -> bytes:
        return self.take(self.number(form))

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise PickleError("a name without an end")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def top(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack[-1]

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a name that is no text")
        _refuse_hostile(module, name)
        self.push(Named(f"{module}.{name}"))

    def make(self, callee: object, arguments: object) -> None:
        """In place of `callee(*arguments)`."""
        if not isinstance(callee, Named) or not isinstance(arguments, tuple):
            raise PickleError("it calls what is no name")
        if callee.name in self.builders:
            self.push(self.builders[callee.name](arguments))
            return
        if callee.name.endswith("._reconstructor") and arguments and isinstance(arguments[0], Named):
            callee = arguments[0]
        self.inert.add(callee.name)
        self.push(Inert(callee.name, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, Named | str | int | float | tuple | None):
            raise PickleError("it sets the state of what has none")

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise PickleError("it appends to what is no list")

    def store(self, values: list[Any]) -> None:
        target = self.top()
        target = target.entries if isinstance(target, Inert) else target
        if not isinstance(target, dict) or len(values) % 2:
            raise PickleError("it sets items of what is no dictionary, or a key without a value")
        for at in range(0, len(values), 2):
            target[_key(values[at])] = values[at + 1]

    def remember(self, place: int) -> None:
        self.memo[place] = self.top()

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise PickleError(f"it takes number {place} of the memo, which is not there")
        self.push(self.memo[place])


def _key(value: object) -> Any:
    """A key whose hash is no work: that of tuples in tuples can take for ever, and many numbers have one hash."""
    fine = value is None or isinstance(value, str | bytes | Latin | Named | Inert)
    if isinstance(value, tuple):
        fine = len(value) <= 8 and all(isinstance(part, str) for part in value)
    if isinstance(value, int):
        fine = abs(value) < _KEY
    if not fine:
        raise PickleError("a key that is no text and no small number")
    return value


_STOP = ord(".")
_BYTE, _SHORT, _INT, _SIGNED, _LONG = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i", "<Q"))
_DOUBLE = struct.Struct(">d")


def _protocol(m: _Machine) -> None:
    found = m.number(_BYTE)
    if not 2 <= found <= 5:
        raise PickleError(f"pickle protocol {found}; torch writes 2")


def _frame(m: _Machine) -> None:
    if m.number(_LONG) > len(m.data) - m.at:
        raise IndexError


def _whole(form: struct.Struct) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        size = m.number(form)
        if size > _DIGITS:
            raise PickleError(f"a whole number of {size:,} bytes")
        m.push(int.from_bytes(m.take(size), "little", signed=True))

    return step


def _text(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.counted(form).decode("utf-8", "surrogatepass"))


def _bytes(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.counted(form))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(tuple(m.pop() for _ in range(count))[::-1])


def _new_with_names(m: _Machine) -> None:
    names, arguments, callee = m.pop(), m.pop(), m.pop()
    if not isinstance(names, dict) or not isinstance(arguments, tuple):
        raise PickleError("it calls what is no name")
    m.make(callee, (*arguments, names) if names else arguments)


def _of_two(do: Callable[[_Machine, Any, Any], None]) -> Callable[[_Machine], None]:
    return lambda m: do(m, *[m.pop(), m.pop()][::-1])


_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord(opcode): step
    for opcode, step in {
        "\x80": _protocol,
        "\x95": _frame,
        "(": lambda m: m.marks.append(len(m.stack)),
        "0": _Machine.pop,
        "1": _Machine.since_mark,
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(m.number(_SIGNED)),
        "K": lambda m: m.push(m.number(_BYTE)),
        "M": lambda m: m.push(m.number(_SHORT)),
        "\x8a": _whole(_BYTE),
        "\x8b": _whole(_INT),
        "G": lambda m: m.push(m.number(_DOUBLE)),
        "X": _text(_INT),
        "\x8c": _text(_BYTE),
        "\x8d": _text(_LONG),
        "B": _bytes(_INT),
        "C": _bytes(_BYTE),
        "\x8e": _bytes(_LONG),
        "\x96": _bytes(_LONG),
        "]": lambda m: m.push([]),
        "a": lambda m: m.extend([m.pop()]),
        "e": lambda m: m.extend(m.since_mark()),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "}": lambda m: m.push({}),
        "s": lambda m: m.store([m.pop(), m.pop()][::-1]),
        "u": lambda m: m.store(m.since_mark()),
        "\x8f": lambda m: m.push([]),
        "\x90": lambda m: m.extend(m.since_mark()),
        "\x91": lambda m: m.push(m.since_mark()),
        "h": lambda m: m.recall(m.number(_BYTE)),
        "j": lambda m: m.recall(m.number(_INT)),
        "q": lambda m: m.remember(m.number(_BYTE)),
        "r": lambda m: m.remember(m.number(_INT)),
        "\x94": lambda m: m.remember(len(m.memo)),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": _of_two(_Machine.name),
        "R": _of_two(_Machine.make),
        "\x81": _of_two(_Machine.make),
        "\x92": _new_with_names,
        "b": _Machine.build,
        "Q": lambda m: m.push(m.persistent(m.pop())),
    }.items()
}
