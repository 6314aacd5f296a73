"""A folder of files under one manifest: each file's size and sha256, and the manifest's own digest last.

    {"format": 1, "step": 1000, "files": {"model.safetensors": {"size": .., "sha256": ".."}, ..},
      "sha256": ".."}           <- digest of every byte before this line

`check` goes from cheap to dear: the manifest's own digest before it is parsed, then names, then sizes, then
digests, then the headers of tensor files; it follows no link and reads nothing that is not listed. It does
not parse the files themselves. A digest guards against damage, not against an author who means harm, so what
such a one could put into a header is checked too.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from esolm import plain

FORMAT = 1
MANIFEST = "manifest.json"


class SealError(ValueError):
    """A sealed folder is incomplete, damaged or not ours. The message names the first bad file."""


def seal(folder: Path, names: Sequence[str], *, step: int, known: Mapping[str, str] | None = None) -> None:
    """Sync the files `names` of a folder to disk, write and sync its manifest, then the folder itself. Digests that are
    `known` are not taken again."""
    for name in names:
        sync(folder / name)
    for inner in {(folder / name).parent for name in names} - {folder}:
        sync(inner)
    digests = {**_digests(folder, [name for name in names if name not in (known or {})]), **(known or {})}
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digests[name]} for name in names}
    body = plain.render({"format": FORMAT, "step": step, "files": files}).removesuffix("\n}\n") + ",\n"
    text = body.encode() + _last_line(hashlib.sha256(body.encode()).hexdigest())
    (folder / MANIFEST).write_bytes(text)
    sync(folder / MANIFEST)
    sync(folder)


def check(folder: Path, *, needed: Iterable[str], allowed: re.Pattern[str], digests: bool = True) -> dict[str, Any]:
    """The manifest of a folder whose every file is the one it lists, with all of `needed` and nothing that
    does not match `allowed`. `digests=False` leaves out the digests and nothing else. Raises SealError."""
    if not folder.is_dir():
        raise SealError(f"{folder} is not a folder with a {MANIFEST}")
    manifest = _manifest(folder / MANIFEST, needed, allowed)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name in sorted(_names_in(folder, files) - {MANIFEST} - files.keys()):
        raise SealError(f"{folder / name} is not in the manifest; move it elsewhere")
    for name, entry in files.items():
        size = _plain_file(folder / name).st_size
        if size != entry["size"]:
            raise SealError(f"{folder / name} is damaged: expected {entry['size']} bytes, found {size}{_REMEDY}")
    for name, found in _digests(folder, list(files) if digests else []).items():
        expected = files[name]["sha256"]
        if found != expected:
            raise SealError(f"{folder / name} is damaged: expected sha256 {expected}, found {found}{_REMEDY}")
    for name in files:
        if name.endswith(".safetensors"):
            _check_header(folder / name)
    return manifest


def text(path: Path, *, limit: int) -> str:
    """The text of a plain file of at most `limit` bytes. Raises SealError."""
    try:
        return _bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise SealError(f"{path} is damaged: not UTF-8 at byte {error.start}") from None


def sync(path: Path) -> None:
    """Return once a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REMEDY = "; copy it again, or use an older step"
_MANIFEST_LIMIT = 2**20
_HEADER_LIMIT = 4 * 2**20  # about 25,000 tensors; a header is parsed in Python, so this bounds the time
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def _last_line(digest: str) -> bytes:
    return f'  "sha256": "{digest}"\n}}\n'.encode()


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets go of the interpreter
            return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))
    except RuntimeError:  # no room for one more thread
        return {name: _digest(folder / name) for name in names}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(path: Path, needed: Iterable[str], allowed: re.Pattern[str]) -> dict[str, Any]:
    raw = _bytes(path, _MANIFEST_LIMIT)
    body, last = raw[: -len(_last_line("0" * 64))], raw[-len(_last_line("0" * 64)) :]
    digest = hashlib.sha256(body).hexdigest()
    if last != _last_line(digest):
        recorded = re.search(rb"[0-9a-f]{64}", last)
        expected = f"sha256 {recorded[0].decode()}" if recorded else "a digest at its end"
        raise SealError(f"{path} is damaged: expected {expected}, found {digest}{_REMEDY}")
    manifest = plain.parse(raw.decode(), depth=8)
    version = manifest.get("format")
    if version != FORMAT or isinstance(version, bool):
        remedy = "it was not written by esolm"
        if type(version) is int:
            remedy = "upgrade esolm" if version > FORMAT else "read it with the older esolm that wrote it"
        raise SealError(f"{path} has format {version!r}, this version reads format {FORMAT}; {remedy}")
    files = manifest.get("files")
    if type(manifest.get("step")) is not int or manifest["step"] < 0 or not isinstance(files, dict):
        raise SealError(f"{path} is not a manifest: expected the keys format, step, files, sha256")
    for name, entry in files.items():
        if not allowed.fullmatch(name):
            raise SealError(f"{path} lists {name[:60]!r}, a name that does not belong here")
        _check_entry(path, name, entry)
    for name in needed:
        if name not in files:
            raise SealError(f"{path} lists no {name}, which must be there")
    return dict(manifest)


def _check_entry(path: Path, name: str, entry: object) -> None:
    match entry:
        case {"size": int(size), "sha256": str(digest)} if size >= 0 and _DIGEST.fullmatch(digest):
            return
    raise SealError(f"{path} is not a manifest: {name} needs a size and a sha256")


def _bytes(path: Path, limit: int) -> bytes:
    if _plain_file(path).st_size > limit:
        raise SealError(f"{path} has more than {limit} bytes; it is not what its name says")
    return path.read_bytes()


def _plain_file(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise SealError(f"{path} is missing{_REMEDY}") from None
    if not stat.S_ISREG(found.st_mode):
        raise SealError(f"{path} is not a plain file; a link must be replaced by the file itself")
    return found


def _names_in(folder: Path, listed: Iterable[str]) -> set[str]:
    """What a folder holds, and what those inner folders hold that listed files are in; follows no link."""
    inner = {name.partition("/")[0] for name in listed if "/" in name}
    names: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in inner and entry.is_dir(follow_symlinks=False):
                names.update(f"{entry.name}/{path.name}" for path in Path(entry.path).iterdir())
            else:
                names.add(entry.name)
    return names


def _check_header(path: Path) -> None:
    """Refuse a safetensors file unless its tensors fill it exactly, one after another, with no name twice."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise SealError(f"{path} claims a header of {length} bytes; at most {_HEADER_LIMIT} are read")
        try:
            header = plain.parse(file.read(length).decode(), depth=4)
        except ValueError as error:
            raise SealError(f"{path} has a bad header: {error}") from None
    if not isinstance(header, dict):
        raise SealError(f"{path} has a bad header: expected an object")
    header.pop("__metadata__", None)
    position = 0
    for start, stop in sorted(_span(path, name, entry) for name, entry in header.items()):
        if start != position:
            raise SealError(f"{path} has a bad header: tensors overlap or leave a gap at byte {start}")
        position = stop
    if position != size - 8 - length:
        raise SealError(f"{path} has a bad header: {position} bytes of tensors, found {size - 8 - length}")


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            sound = dtype in _BITS and all(type(side) is int and 0 <= side < 2**40 for side in shape)
            if sound and len(shape) <= 16 and 8 * (stop - start) == _BITS[dtype] * prod(shape):
                return start, stop
    raise SealError(f"{path} has a bad header: tensor {name[:60]!r}")
