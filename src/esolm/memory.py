"""Memory that runs out: noticing it, and saying how much is missing.

A training step that does not fit is done again in smaller micro batches (train.py). A network that does not fit at all
is refused before anything is allocated: weights, gradients, two moments and the average are 20 bytes a parameter.
Limits of address space (RLIMIT_AS), of the machine and of a GPU count; a container's own limit is not read.
"""

import re
from pathlib import Path

import torch

from esolm.denoiser import Config, Denoiser
from esolm.optim import Config as OptimConfig

_GB = 1e9


class TooLarge(MemoryError):
    """A network that cannot be trained in the memory there is. The message says how many GB are missing."""


def ran_out(problem: BaseException) -> bool:
    """Is this error one of memory? torch says so in words only, on a CPU."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(problem)))


def available(device: torch.device) -> int | None:
    """Bytes that can still be had; None if nobody can tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [bytes_left for bytes_left in (_left_of_address_space(), _left_of_machine()) if bytes_left is not None]
    return min(found, default=None)


def needed(network: Config, optim: OptimConfig) -> int:
    """Bytes that training holds between two steps, in float32: weights, gradients, moments, the average."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Denoiser(network).parameters())
    return 4 * parameters * (4 if optim.average is None else 5)


def refuse_too_large(network: Config, optim: OptimConfig, device: torch.device, *, parts: int = 1) -> None:
    """Raise TooLarge if the network (or one of its equal parts) cannot fit, whatever the batch."""
    wanted, left = needed(network, optim) // parts, available(device)
    if left is not None and wanted > left:
        raise TooLarge(
            f"the network needs {wanted / _GB:.2f} GB (weights, gradients, moments, average) before any text, and "
            f"{left / _GB:.2f} GB are there: {(wanted - left) / _GB:.2f} GB are missing; choose a smaller "
            "network.width or network.layers, or a machine with more"
        )


def one_text_too_large(problem: BaseException, device: torch.device) -> TooLarge:
    """The end of a run that cannot learn from one text at a time."""
    tried, left = _tried(str(problem)), available(device)
    missing = "more memory than there is"
    if tried:
        missing = f"at least {max(tried - (left or 0), tried // 10) / _GB:.2f} GB more"
    return TooLarge(
        f"one text at a time (micro_batch=1) needs {missing}: choose a smaller network.length, network.width or "
        "network.layers, or a machine with more"
    )


def _tried(message: str) -> int:
    """Bytes that could not be had, as torch words it on a CPU or a GPU."""
    if found := re.search(r"tried to allocate (\d+) bytes", message):
        return int(found[1])
    if found := re.search(r"[Tt]ried to allocate ([\d.]+) ([KMGT])iB", message):
        return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
    return 0


def _left_of_address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None
    return max(0, limit - used)


def _left_of_machine() -> int | None:
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", told, re.MULTILINE)
    return 1024 * sum(map(int, found)) if found else None
