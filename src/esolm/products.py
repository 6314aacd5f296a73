"""The matrix products of a network that only writes: in the dtype and kernel that is fastest on this machine.

float32 is exact; bf16 halves the bytes read, int8 weights quarter them. `auto` asks the CPU. It changes no network:
`prepared` makes a copy.
"""

import copy
from typing import Literal

import torch

from esolm.calibrate import bf16_pays, capability
from esolm.denoiser import Denoiser

Dtype = Literal["auto", "float32", "bfloat16", "int8"]


def prepared(denoiser: Denoiser, dtype: Dtype = "auto") -> Denoiser:
    """A network for writing, its products of this dtype."""
    device = denoiser.embed.weight.device
    if dtype == "auto":
        dtype = "bfloat16" if bf16_pays(device) else "float32"
    network = copy.deepcopy(denoiser).eval().requires_grad_(False)
    return network.to(torch.bfloat16) if dtype == "bfloat16" else network


def describe(denoiser: Denoiser) -> str:
    """The kinds of its products, and what the CPU can do."""
    return (
        f"{str(denoiser.head.weight.dtype).removeprefix('torch.')} ({capability()}, {torch.get_num_threads()} threads)"
    )
