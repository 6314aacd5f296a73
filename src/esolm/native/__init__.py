"""A step of writing in one call of C: the library, compiled here once, and the two records that it takes.

    step.c          a list of operations over some rows, shared by a pool of threads
    operations.h    embedding, norms, products, rotary places, attention, gates
    draw.h          a draw
    vectors.h       vectors as wide as the processor's, weights of any dtype

The text is compiled at its first use, by the C compiler that is found (`CC`, cc, gcc, clang), for this processor, into
the user's folder of caches. Without a compiler, or with ESOLM_NATIVE=0, there is no library, and what would use it uses
torch; `found` and one line of the log "esolm.native" say why. It knows no network: engine.py does.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

_HERE = Path(__file__).parent
_TEXTS = ("step.c", "draw.h", "operations.h", "vectors.h")
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_PATIENCE = 120  # seconds that a compiler is given
_LOG = logging.getLogger(__name__)

EMBED, NORM, PRODUCT, ROTATE, TAKE, ATTEND, GATE, SUM, FIND = range(9)  # kinds of operations
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "pairs": 4}
RMS, ADD, GELU = 1, 1, 2  # flags: of a norm, of a product
OUTSIDE = -2  # what `Library.run` gives for an id or a position that is not there
PANEL, QUERIES, BLOCK = 32, 2, 512


class Op(ctypes.Structure):
    """One operation; operations.h says what its fields mean."""

    _fields_: ClassVar[Any] = [
        *((name, c_int32) for name in ("kind", "dtype", "flags", "layer", "inputs", "outputs", "source", "target")),
        *((name, c_int32) for name in ("which", "unused")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    ]


class Pass(ctypes.Structure):
    """What operations of a call work on."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("batch", "rows", "count", "heads", "kv_heads", "dim")),
        *((name, c_int64) for name in ("capacity", "used", "mask_text", "mask_row")),
        ("epsilon", c_double),
        *((name, c_void_p) for name in ("at", "starts", "taken", "tokens", "positions", "slots", "mask")),
        *((name, c_void_p) for name in ("keys", "values", "buffers", "scores")),
        ("temperature", c_double),
        *((name, c_void_p) for name in ("uniform", "sums", "drawn")),
    ]


@dataclass(frozen=True)
class Library:
    """The compiled text. `run(ops, count, passes, threads)` takes the address of the passes; it is 0, OUTSIDE, or -1
    for too many operations."""

    run: Callable[[ctypes.Array[Op], int, int, int], int]
    advise: Callable[[int, int], None]  # that so many bytes from an address are read from front to back
    lanes: int  # floats in a vector
    pairs: bool  # does it multiply bfloat16 numbers two by two (AVX512 bf16)?

    def whole(self, numbers: int) -> int:
        """Up to a whole vector."""
        return -(-numbers // self.lanes) * self.lanes


@dataclass(frozen=True)
class Found:
    """The compiled text, or why there is none."""

    library: Library | None = None
    why: str = ""


def library() -> Library | None:
    """The compiled text, or None where there is none."""
    return found().library


@cache
def found() -> Found:
    """The compiled text, compiled if need be, or the reason why there is none, told in the log as well."""
    if os.environ.get("ESOLM_NATIVE") == "0":
        return Found(why="ESOLM_NATIVE=0 turns it off")
    result = _sought()
    if result.library is None:
        _LOG.info("no compiled engine, torch writes: %s", result.why)
    return result


def _sought() -> Found:
    if os.name != "posix":
        return Found(why="it needs POSIX threads")
    given = os.environ.get("CC")
    compiler = next((path for name in (given, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if compiler is None:
        return Found(why="there is no C compiler: install gcc or clang, or name one in CC")
    try:
        loaded = _loaded(_compiled(compiler))
    except subprocess.CalledProcessError as problem:
        words = problem.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in words if "error" in line), words[0] if words else f"exit {problem.returncode}")
        return Found(why=f"{compiler} failed ({said}): name another compiler in CC")
    except (OSError, AttributeError, subprocess.SubprocessError) as problem:
        return Found(why=f"what {compiler} made cannot be had: {problem}")
    return Found(loaded) if loaded else Found(why=f"what {compiler} made has other sizes: name another compiler in CC")


def _loaded(path: Path) -> Library | None:
    made = ctypes.CDLL(str(path))
    made.esolm_run.argtypes = [c_void_p, c_int, c_void_p, c_int]
    made.esolm_advise.argtypes = [c_void_p, c_size_t]
    made.esolm_advise.restype = None
    sizes = (c_int64 * 7)()
    made.esolm_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(Op), ctypes.sizeof(Pass), PANEL, sizes[3], QUERIES, BLOCK, sizes[6]]:
        return None
    return Library(run=made.esolm_run, advise=made.esolm_advise, lanes=sizes[3], pairs=bool(sizes[6]))


def _compiled(compiler: str) -> Path:
    """The library for this text, compiler and processor: compiled, or found in the cache."""
    arm = platform.machine() in ("aarch64", "arm64")
    command = [compiler, *_FLAGS, "-mcpu=native" if arm else "-march=native"]
    known = [*((_HERE / name).read_bytes() for name in _TEXTS), " ".join(command).encode(), _processor()]
    name = hashlib.sha256(b"\0".join(known)).hexdigest()[:32] + ".so"
    folder = _folder()
    path = folder / name
    if not path.exists():
        _LOG.info("compiling the engine for this processor, once: some seconds")
        handle, made = tempfile.mkstemp(dir=folder)
        os.close(handle)
        try:
            subprocess.run(
                [*command, str(_HERE / "step.c"), "-o", made, "-lm"],
                check=True,
                timeout=_PATIENCE,
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )
            Path(made).replace(path)
        finally:
            Path(made).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    """The user's folder of caches, if nobody else can write there; else a new one that this process removes."""
    with suppress(OSError, RuntimeError):  # no home, or none to write in
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esolm" / "native"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = place.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(place, os.W_OK):
            return place
    made = Path(tempfile.mkdtemp(prefix="esolm-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _processor() -> bytes:
    """What tells this processor from one that lacks its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "model name", "Features", "CPU part")
    told = dict.fromkeys(line for line in lines if line.startswith(wanted))
    return "\n".join([platform.machine(), platform.processor(), *told]).encode()
