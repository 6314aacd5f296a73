"""What this machine can do, measured: memory bandwidth, and rates of matrix products per dtype and number of rows.

CPUs differ: bf16 is 2.8 times as fast as float32 on one and 5 times slower on another, so nothing is assumed. Figures
are medians of at least five timings, each long enough for the clock. It chooses no kernels; `products` does.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

_REPEATS = 5
_LEAST_SECONDS = 2e-3  # a timing shorter than this is repeated inside


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The figures of one machine, all measured in one run."""

    cpu: str
    threads: int
    bandwidth: float  # bytes a second read, of a copy that fits no cache
    gemm: dict[str, float]  # floating-point operations a second, by dtype, of a large product
    gemv: dict[str, float]  # bytes of weights a second, by dtype, of a product with one row


def machine() -> Machine:
    """Measure this machine: about a second."""
    return Machine(
        cpu=capability(),
        threads=torch.get_num_threads(),
        bandwidth=bandwidth(),
        gemm={name: gemm(dtype) for name, dtype in _DTYPES.items()},
        gemv={name: gemv(dtype) for name, dtype in _DTYPES.items()},
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def capability() -> str:
    """What the CPU says it can do, as one word or two: AVX2, AVX512, AVX512 bf16, AMX."""
    words = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        words.append("bf16")
    if torch.cpu._is_amx_tile_supported():
        words.append("AMX")
    return " ".join(words)


def now(device: torch.device) -> float:
    """The time, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bandwidth(megabytes: int = 256) -> float:
    """Bytes a second of a copy too large for any cache, reading and writing counted."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def gemm(dtype: torch.dtype, size: int = 1024, rows: int = 1024) -> float:
    """Floating-point operations a second of a product of `rows x size` with `size x size`."""
    x, w = torch.randn(rows, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * rows * size * size / seconds(lambda: torch.nn.functional.linear(x, w))


def gemv(dtype: torch.dtype, width: int = 1024, outputs: int = 32_768) -> float:
    """Bytes of weights a second of a product with one row, of a matrix too large for any cache."""
    x, w = torch.randn(1, width, dtype=dtype), torch.randn(outputs, width, dtype=dtype)
    return w.nbytes / seconds(lambda: torch.nn.functional.linear(x, w))


def seconds(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Median time of one call."""
    work()
    began = time.perf_counter()
    work()
    inner = max(1, round(_LEAST_SECONDS / max(time.perf_counter() - began, 1e-7)))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(inner):
            work()
        times.append((time.perf_counter() - began) / inner)
    return statistics.median(times)


@cache
def bf16_pays(device: torch.device) -> bool:
    """Are large products in bf16 faster than in float32 here? Asked of CUDA, measured once on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    return gemm(torch.bfloat16, 512, 512) > 1.2 * gemm(torch.float32, 512, 512)
