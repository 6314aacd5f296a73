"""What oneDNN keeps of its own on a CPU in bf16: a kernel for each shape of a product, of some 0.6 MB.

Rows of a diffusion method differ from step to step, and so do shapes of products. oneDNN and torch keep 1,024 kernels
by themselves, and those they let go leave holes in memory: 20,000 shapes came to 1.4 GB, with 256 kernels to 0.23. One
step has some 100 shapes, so no step gets slower.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

KEPT = 256
_TRIED = 64  # kernels made to see what one takes
_ROWS, _WIDTH = 301, 72  # of the first of them
_WHOLE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is let go leaves memory, so that all growth is of kernels


def limit() -> None:
    """Let oneDNN keep no more than `KEPT`, unless the environment says how many. For a process that has made no product
    yet: both read it at the first."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT))


@cache
def bytes_of_one() -> int:
    """Memory that one kernel takes here, measured in a process of its own, as this one may have all it keeps; 0 where
    the system does not tell."""
    command = [sys.executable, "-P", __file__]  # -P: nothing is imported from the folder that the user is in
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | _WHOLE).stdout
    return int(told.split()[-1])


def _measured() -> int:
    import torch

    weight, before = torch.zeros(_WIDTH, _WIDTH, dtype=torch.bfloat16), 0
    for made in range(_TRIED + 1):
        torch.zeros(_ROWS + made, _WIDTH, dtype=torch.bfloat16) @ weight
        before = before or _resident()  # the first product makes more than its kernel
    return max(0, _resident() - before) // _TRIED


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    sys.stdout.write(f"{_measured()}\n")
