"""Tensors in the files of a checkpoint: the optimizer's state is in parts, one file for each rank that wrote it.

    optim/shard-00000.safetensors     rows 0 to n of every tensor, and what has no rows (update counts)
    optim/shard-00001.safetensors     rows n to 2 n of every tensor                      ... the last ones may be empty

The number of shards stands in state.json, so that one too many or too few is noticed. Who writes which rows: ranks.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esolm.seal import SealError

PATTERN = re.compile(r"optim/shard-\d{5}\.safetensors")


def shard(rank: int) -> str:
    """The file of a rank."""
    return f"optim/shard-{rank:05d}.safetensors"


def write(folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a file of a checkpoint that has its config.json."""
    save_file(_own_storage(tensors), folder / file)
    (folder / file).chmod((folder / "config.json").stat().st_mode)  # the library lets nobody else read its files


def joined(folder: Path, files: Sequence[str], num_ranks: object) -> dict[str, Tensor]:
    """The tensors of the shards of a checkpoint: parts end to end, and as it is what only rank 0 wrote. SealError."""
    if list(files) != [shard(rank) for rank in range(len(files))] or len(files) != num_ranks:
        raise SealError(f"{folder} has {len(files)} shards of the optimizer; state.json tells of {num_ranks} ranks")
    first, *rest = found = [load_file(folder / file) for file in files]
    cut = rest[0].keys() if rest else set[str]()
    for file, tensors in zip(files[1:], rest, strict=True):
        for odd in sorted(tensors.keys() ^ cut) + [name for name in cut if not _go_together(first, tensors, name)]:
            raise SealError(f"{folder / file} does not go with the other shards: see {odd!r}")
    return {name: torch.cat([tensors[name] for tensors in found]) if name in cut else first[name] for name in first}


def _go_together(first: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> bool:
    """Whether one tensor of two shards may be laid end to end."""
    if name not in first or name not in other or not first[name].ndim:
        return False
    return first[name].shape[1:] == other[name].shape[1:] and first[name].dtype == other[name].dtype


def _own_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory (tied weights are written twice)."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = tensor.nbytes == storage.nbytes() and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor if whole else tensor.clone()
    return apart
