"""What `torch.save` wrote, read without torch's loader: a zip of one pickle (pickled.py) and a member for each storage.

    NAME/data.pkl  NAME/data/0  NAME/data/1 ...     all stored as they are: torch never compresses

Tensors stay descriptions (`Stored`) until `Archive.tensor` reads one out of its member, so that a checkpoint of
gigabytes costs what is taken from it. The file is believed in nothing: names, sizes, offsets and strides are checked
before use, and a compressed member, a link or a second `data.pkl` ends the reading.

It does not read what torch wrote before version 1.6, sparse or quantized tensors, or other byte orders.
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esolm import pickled

_MEMBERS = 20_000
_DIRECTORY = 16 * 2**20  # bytes of the list of members
_DIMENSIONS = 8
_OLD = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"ustar")  # what torch wrote before 1.6 begins with, and at 257
_KINDS = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class ArchiveError(ValueError):
    """A file is damaged, hostile, or not what `torch.save` writes. The message names it."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A member of the archive as numbers of one kind."""

    member: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A tensor that was not read yet: a view of a storage, inside of it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Archive:
    """What a file holds: plain data with `Stored` tensors and `pickled.Inert` objects in it."""

    path: Path
    root: Any
    inert: frozenset[str]
    members: dict[str, zipfile.ZipInfo]
    prefix: str

    def tensor(self, stored: Stored) -> Tensor:
        """Read a tensor. ArchiveError if its bytes are not those that were written."""
        storage, info = stored.storage, self.members[f"{self.prefix}data/{stored.storage.member}"]
        with _told(self.path), self.path.open("rb") as file:
            found = _bytes_of(file, info, 2**48)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=storage.dtype)
        flat = torch.frombuffer(found, dtype=storage.dtype, count=storage.count)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)


def open_archive(path: Path) -> Archive:
    """The plain data of a file that `torch.save` wrote. ArchiveError, which says what is wrong with it."""
    with _told(path):
        with path.open("rb") as file:
            _refuse_other_kinds(file)
            with zipfile.ZipFile(file) as opened:
                infos = opened.infolist()
            members = _checked(infos, path.stat().st_size)
            (found, *more) = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")] or [""]
            if not found or more:
                raise ArchiveError(f"it has {len(more) + 1 if found else 'no'} data.pkl, and torch writes one")
            prefix = found.removesuffix("data.pkl")
            order = members.get(f"{prefix}byteorder")
            if order is not None and _bytes_of(file, order, 16) != b"little":
                raise ArchiveError("its byte order is not little-endian: save it again on a usual machine")
            data = bytes(_bytes_of(file, members[found], pickled.LARGEST))
        reader = _Tensors(members, prefix)
        root, inert = pickled.read(data, reader.builders(), reader.storage)
        return Archive(path=path, root=root, inert=frozenset(inert), members=members, prefix=prefix)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except ArchiveError as problem:
        raise ArchiveError(f"cannot read {path}: {problem}") from None
    except pickled.PickleError as problem:
        raise ArchiveError(f"cannot read {path}: {problem}") from None
    except (zipfile.BadZipFile, RuntimeError, ValueError, OverflowError, EOFError, struct.error) as problem:
        raise ArchiveError(f"cannot read {path}: a damaged archive ({problem})") from None  # what zipfile has to say


# -- the zip -----------------------------------------------------------------------------------------------


def _refuse_other_kinds(file: Any) -> None:
    """ArchiveError for what is no zip, and for one whose list of members is too long to be read."""
    start = file.read(512)
    if start.startswith(_OLD[0]) or start[257:262] == _OLD[1]:
        raise ArchiveError("torch before 1.6 wrote it: load it with a torch that you trust it to, and save it again")
    end = file.seek(0, 2)
    file.seek(max(0, end - 65_557))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if not start.startswith(b"PK\3\4") or at < 0:
        raise ArchiveError("it is no file that torch.save wrote, or its end is missing")
    size = int.from_bytes(tail[at + 12 : at + 16], "little")
    if size == 2**32 - 1 and tail[at - 20 : at - 16] == b"PK\6\7":
        file.seek(int.from_bytes(tail[at - 12 : at - 4], "little"))
        size = int.from_bytes(file.read(48)[40:48], "little")
    if size > _DIRECTORY:
        raise ArchiveError(f"its list of members has {size:,} bytes, at most {_DIRECTORY:,} are read")
    file.seek(0)


def _checked(infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name: plain files inside of the archive, apart from each other, stored as they are."""
    if len(infos) > _MEMBERS:
        raise ArchiveError(f"it has {len(infos):,} members, at most {_MEMBERS:,} are read")
    members: dict[str, zipfile.ZipInfo] = {}
    position = 0
    for info in sorted(infos, key=lambda one: one.header_offset):
        name = info.orig_filename
        if name != info.filename or name.startswith("/") or "\\" in name or ":" in name:
            raise ArchiveError(f"a member has the name {name[:60]!r}, which leads out of the archive")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ArchiveError(f"a member has the name {name[:60]!r}, which is no plain name")
        mode = info.external_attr >> 16
        if info.flag_bits & 1 or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
            raise ArchiveError(f"{name[:60]!r} is no plain file, but a link, a folder or locked")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ArchiveError(f"{name[:60]!r} is compressed, as torch never writes it")
        if name in members:
            raise ArchiveError(f"{name[:60]!r} is there twice")
        if info.header_offset < position:
            raise ArchiveError(f"{name[:60]!r} lies over another member")
        position = info.header_offset + 30 + len(name.encode()) + info.file_size
        if position > size:
            raise ArchiveError(f"{name[:60]!r} lies beyond the end of the file")
        members[name] = info
    return members


def _start_of(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin, by the header in front of them, which must be its own."""
    file.seek(info.header_offset)
    header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + 30 + name + extra
    if len(header) < 30 or header[:4] != b"PK\3\4" or file.read(name) != info.orig_filename.encode():
        raise ArchiveError(f"{info.filename[:60]!r} is not where the list of members says")
    if start + info.file_size > file.seek(0, 2):
        raise ArchiveError(f"{info.filename[:60]!r} lies beyond the end of the file")
    return start


def _bytes_of(file: Any, info: zipfile.ZipInfo, limit: int) -> bytearray:
    """The bytes of a member, none of them other than when they were written."""
    if info.file_size > limit:
        raise ArchiveError(f"{info.filename} has {info.file_size:,} bytes, at most {limit:,} are read")
    file.seek(_start_of(file, info))
    found = bytearray(info.file_size)
    if file.readinto(found) != info.file_size or zlib.crc32(found) != info.CRC:
        raise ArchiveError(f"{info.filename} is damaged: its bytes are not those that were written")
    return found


# -- tensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Tensors:
    """What stands in the pickle in place of torch's functions: descriptions, checked against the members."""

    members: dict[str, zipfile.ZipInfo]
    prefix: str

    def builders(self) -> dict[str, pickled.Builder]:
        return {
            "torch.Size": lambda arguments: arguments[0] if len(arguments) == 1 else (),
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._utils._rebuild_tensor": self.view,
            "torch._utils._rebuild_tensor_v2": self.view,
        }

    def storage(self, identity: object) -> object:
        """A storage by its persistent id; a kind that this module does not know stays a name."""
        match identity:
            case ("storage", pickled.Named(kind), str(member), str(), int(count), *_) if 0 <= count < 2**48:
                dtype = _KINDS.get(kind.rpartition(".")[2])
                info = self.members.get(f"{self.prefix}data/{member}")
                if dtype is None:
                    return pickled.Inert(kind)
                if info is None or info.file_size != count * dtype.itemsize:
                    size = "is missing" if info is None else f"has {info.file_size:,} bytes"
                    raise ArchiveError(f"storage {member[:20]!r} of {count:,} {dtype} {size}")
                return Storage(member, dtype, count)
        raise ArchiveError("a storage without a kind, a member or a size")

    def view(self, arguments: tuple[Any, ...]) -> object:
        """In place of torch's `_rebuild_tensor_v2(storage, offset, shape, stride, ...)`."""
        match arguments:
            case (pickled.Inert(), *_):
                return pickled.Inert("torch.Tensor")
            case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_):
                numbers = [offset, *shape, *stride]
                sound = all(type(number) is int and 0 <= number < 2**48 for number in numbers)
                if sound and len(shape) == len(stride) <= _DIMENSIONS and _inside(storage.count, offset, shape, stride):
                    return Stored(storage, offset, shape, stride)
                raise ArchiveError(f"a tensor that does not lie in its storage of {storage.count:,} numbers")
        raise ArchiveError("a tensor without a storage, a shape or strides")


def _inside(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a view stays in its storage and shows no more numbers than that has."""
    if 0 in shape:
        return max(shape) < 2**20  # nothing is read
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    return last < count and prod(shape) <= count


def _first(arguments: tuple[Any, ...]) -> object:
    if arguments and isinstance(arguments[0], Stored):
        return arguments[0]
    raise ArchiveError("a parameter without a tensor")
