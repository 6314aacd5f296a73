"""Checkpoints on the Hugging Face Hub: fetched by name, and put there.

    "owner/name", "owner/name@revision"  ->  the library's cache (it resumes, checks out offline, obeys its settings)
                                         ->  a folder of plain files, compared with the manifest  ->  checkpoint.load

A name stands for a checkpoint wherever one is asked for. A path that is there comes first, then a model that comes
along. Whatever a repository holds beside a checkpoint's own files is left there. HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT
and HF_HOME are the library's settings and hold here; it is the extra `hub`, imported when a name is first used.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esolm import partial, seal, shipped

CARD = "README.md"


class HubError(ValueError):
    """A name that cannot be fetched, or that cannot be put there. The message says why and what to do."""


def located(path: str | Path) -> Path:
    """The folder that a checkpoint's name stands for: itself, one that comes along, or one of the Hub, fetched if it is
    not on this machine. HubError for a name that only the Hub could know, and that it does not give."""
    path = shipped.located(path)
    return fetched(str(path)) if is_name(path) else path


def is_name(path: str | Path) -> bool:
    """Whether only the Hub could know this: like "owner/name", with no such file here, and no folder called "owner"."""
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not os.path.lexists(text) and not os.path.lexists(text.partition("/")[0])


def fetched(name: str) -> Path:
    """The folder of a checkpoint of the Hub, "owner/name" or "owner/name@revision". What is already on this machine is
    not fetched again; what is damaged, there or on its way, is, once. Every byte is compared with the manifest, so that
    a reader need not do it again. HubError."""
    library, home = _library(name)
    first = _snapshot(library, name, files=(seal.MANIFEST,))
    if not (first / seal.MANIFEST).exists():
        raise HubError(
            f"{name} of the Hub holds no checkpoint of esolm (no {seal.MANIFEST}): if it is a model of the papers' "
            f"authors, esolm import {name} --out DIR makes one of it"
        )
    folder = home / name.partition("@")[0].replace("/", "--") / first.name
    for again in (False, True):
        try:
            if not folder.is_dir():
                _lay_out(_snapshot(library, name, again=again), folder, _OURS)
            seal.check(folder, needed=(), allowed=_OURS)
            return folder
        except seal.SealError as problem:
            damage = str(problem).partition(";")[0]
            shutil.rmtree(folder)
    raise HubError(f"{name} is damaged on the Hub itself, fetched twice: {damage}; ask its owner to push it again")


def published(name: str) -> Path:
    """The files of a repository of the papers' authors, for `importers`: weights and their settings. HubError."""
    library, home = _library(name)
    snapshot = _snapshot(library, name, files=_THEIRS)
    folder = home / "published" / name.partition("@")[0].replace("/", "--") / snapshot.name
    if not folder.is_dir():
        _lay_out(snapshot, folder, re.compile(r"[\w.-]+"))
    return folder


def push(
    folder: Path, name: str, *, private: bool | None = None, revision: str | None = None, message: str | None = None
) -> str:
    """Put the files of a checkpoint's folder, with its card beside them, into a repository, which is made if there is
    none; a `revision` is a branch, made likewise. What an older checkpoint left there and this one lacks goes. Returns
    its address. HubError."""
    library, _ = _library(name)
    if not re.fullmatch(_REPOSITORY, name):
        raise HubError(f"{name!r} is no name of a repository: give owner/name")
    api = library.HfApi()
    with _told(name, library):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"esolm: {folder.name}",
            delete_patterns=list(_FILES),
        )
    return f"{library.constants.ENDPOINT}/{name}"


_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_NAME = re.compile(_REPOSITORY + r"(?:@[\w./-]+)?")
_FILES = ("*.safetensors", "optim/*.safetensors", "config.json", "tokenizer.json", "state.json", seal.MANIFEST)
_OURS = re.compile(r"(?:model|ema|optim/shard-\d{5})\.safetensors|(?:config|tokenizer|state|manifest)\.json")
_OF_THE_NET = ("httpx", "requests", "urllib3", "huggingface_hub")
_THEIRS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model.bin", "config.json", "tokenizer.json")


def _library(name: str) -> tuple[Any, Path]:
    """`huggingface_hub`, and the folder where checkpoints are kept as plain files."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise HubError(f"there is no folder {name} here; for a model of the Hub: pip install 'esolm[hub]'") from None
    return huggingface_hub, Path(huggingface_hub.constants.HF_HOME) / "esolm"


def _snapshot(library: Any, name: str, *, again: bool = False, files: tuple[str, ...] = _FILES) -> Path:
    repository, _, revision = name.partition("@")
    what: dict[str, Any] = {"repo_id": repository, "revision": revision or None, "allow_patterns": list(files)}
    with _told(name, library):
        if not again and files != (seal.MANIFEST,):
            with suppress(library.errors.DryRunError):  # of a Hub that does not answer: told below, if it matters
                partial.complete(library, repository, library.snapshot_download(**what, dry_run=True))
        return Path(library.snapshot_download(**what, force_download=again))


def _lay_out(snapshot: Path, folder: Path, names: re.Pattern[str]) -> None:
    """Files of a snapshot (links into a cache) as plain files, all or none."""
    making = folder.with_name(f".making-{folder.name}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    try:
        for path in sorted(snapshot.rglob("*")):
            inside = path.relative_to(snapshot).as_posix()
            if path.is_file() and names.fullmatch(inside):
                (making / inside).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(path.resolve(), making / inside)
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # on another disk, or on one without such links
        shutil.copyfile(source, target)


@contextmanager
def _told(name: str, library: Any) -> Iterator[None]:
    """What the library and what it speaks with raise, in one line."""
    errors, repository = library.errors, name.partition("@")[0]
    try:
        yield
    except partial.PartialError as problem:
        raise HubError(f"the Hub and {name}: {problem}; try again") from None
    except errors.GatedRepoError:
        raise HubError(f"{repository} asks for its owner's leave: see its page, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository} of the Hub has no revision {name.partition('@')[2]!r}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"no checkpoint {repository}: there is no such folder here and no such repository on the Hub (for a "
            "private one set HF_TOKEN, or: hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError as problem:
        offline = library.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({_cause(problem)})"
        raise HubError(f"no checkpoint {name}: there is no such folder here, none is kept, and {why}") from None
    except Exception as problem:
        own = isinstance(problem, OSError) and problem.filename is not None  # of this machine's disk
        if own or not (isinstance(problem, OSError) or type(problem).__module__.startswith(_OF_THE_NET)):
            raise
        raise HubError(f"the Hub and {name}: {_cause(problem)}; try again") from None


def _cause(problem: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while (deeper := problem.__cause__ or problem.__context__) is not None:
        problem = deeper
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:160]
