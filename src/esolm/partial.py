"""Large files of the Hub, kept as far as they came: what a killed process had, the next one does not fetch again.

    blobs/SHA256.esolm.incomplete    grows, in any number of processes, one after the other
      -> blobs/SHA256                once that is its digest: where the library looks before it fetches

huggingface_hub did so itself up to 1.17. Since then each of its downloads has a file with a name of its own, which no
other process finds, because two that appended to one, where locks do not hold, spoilt it. Here such a lock costs a
second fetch only: every byte is written at its own place, and the whole is compared with the digest before the cache
has it. The library fetches the rest: small files, those above what it gives by HTTP (50 GB), those without a sha256.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


class PartialError(ValueError):
    """A file that does not arrive as it is on the Hub. The message says which."""


def complete(library: Any, repository: str, files: Iterable[Any]) -> None:
    """Fetch the large ones of a repository's files (`DryRunFileInfo` of a dry run) into the library's cache, each from
    where an earlier process stopped. PartialError, and what the library raises."""
    constants = library.constants
    for file in files:  # below one chunk the library writes nothing before it has all
        if file.will_download and constants.DOWNLOAD_CHUNK_SIZE < file.file_size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _complete(library, repository, file)


def _complete(library: Any, repository: str, file: Any) -> None:
    url = library.hf_hub_url(repository, file.filename, revision=file.commit_hash)
    digest = library.get_hf_file_metadata(url).etag
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return
    cache, name = Path(library.constants.HF_HUB_CACHE), f"models--{repository.replace('/', '--')}"
    blob, lock = cache / name / "blobs" / digest, cache / ".locks" / name / f"{digest}.lock"  # the library's own
    partial = blob.with_name(f"{digest}.esolm.incomplete")  # a name that `hf cache prune` clears away
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with library.utils.WeakFileLock(lock):
        for _ in (1, 2):  # the second time from the start: what an earlier process left may be bad
            if blob.exists():  # another process had it first
                return
            right = _grown(library, url, partial, file) == digest
            with suppress(FileNotFoundError):  # where locks do not hold, another process was first
                partial.replace(blob) if right else partial.unlink()
    if not blob.exists():
        raise PartialError(f"{file.filename} arrived twice with another sha256 than the Hub gives for it")


def _grown(library: Any, url: str, path: Path, file: Any) -> str:
    """The digest of a file to which all is added that it lacks."""
    with open(path, "r+b", opener=_opened) as there:  # not "ab": each byte goes to its own place, whoever else writes
        held = there.seek(0, os.SEEK_END)
        if held > file.file_size:
            held = there.seek(0)
            there.truncate()
        library.file_download.http_get(
            url,
            there,
            resume_size=held,
            headers=library.utils.build_hf_headers(),
            expected_size=file.file_size,
            displayed_filename=file.filename,
        )
        there.seek(0)
        return hashlib.file_digest(there, "sha256").hexdigest()


def _opened(path: str, flags: int) -> int:
    """Made if it is not there, and left as it is if it is."""
    return os.open(path, flags | os.O_CREAT, 0o666)
