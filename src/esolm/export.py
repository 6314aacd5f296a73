"""One step of the denoiser as a program of torch, to be run where esolm is not installed.

    program = export("runs/first", "step.pt2")
    logits, keys, values = torch.export.load("step.pt2").module()(tokens, positions, reads, keys, values)

    tokens      [batch, row]                            ids, the mask's where nothing is written yet
    positions   [batch, row]                            where each stands in its text
    reads       [batch, 1, row, cached + row]           who reads whom: cached rows first, then these
    keys        [layer, batch, head, cached, dim]       of what was written before; values alike
    ->          logits [batch, row, vocab], and the keys and values of these rows, to be kept or thrown away

Any number of texts and of cached rows, none too; two rows or more: one row alone is given twice. What enters the
cache, in what order, and what is drawn is the sampler's (sample.py), and is not exported.
"""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from esolm.attention import Relation
from esolm.cache import Cache
from esolm.denoiser import Denoiser
from esolm.model import load
from esolm.plain import FileError


class Step(nn.Module):
    """The denoiser's own forward, with what is cached as plain tensors that come in and go out."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        tokens: Int64[Tensor, "batch row"],
        positions: Int64[Tensor, "batch row"],
        reads: Bool[Tensor, "batch 1 row key"],
        keys: Float[Tensor, "layer batch kv_head cached dim"],
        values: Float[Tensor, "layer batch kv_head cached dim"],
    ) -> tuple[
        Float[Tensor, "batch row vocab"],
        Float[Tensor, "layer batch kv_head row dim"],
        Float[Tensor, "layer batch kv_head row dim"],
    ]:
        cache = _Beside(keys, values)
        hidden = self.denoiser(tokens, positions, Relation(mask=reads), cache)
        return self.denoiser.logits(hidden), torch.stack(cache.new_keys), torch.stack(cache.new_values)


def export(path: str | Path, out: str | Path) -> torch.export.ExportedProgram:
    """Write one step of a checkpoint's network (averaged weights, float32) to a file, and return the program.

    FileError for a file that is there already or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise FileError(f"{out} exists already and would be lost: remove it, or choose another file")
    if not out.absolute().parent.is_dir():
        raise FileError(f"cannot write to {out}: there is no folder {out.parent}; make it, or choose another")
    program = exported(load(path, dtype="float32").denoiser)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        with unfinished.open("wb") as file:  # torch wants a name that ends in .pt2, a file may have any
            torch.export.save(program, file)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return program


def exported(denoiser: Denoiser) -> torch.export.ExportedProgram:
    """One step of a network as a program, of any number of texts, rows and cached rows."""
    step = Step(denoiser.eval())
    batch, rows, cached = 3, 4, 5  # of the example; different ones, so that none is taken for another
    config = denoiser.config
    tokens = torch.zeros(batch, rows, dtype=torch.int64)
    reads = torch.ones(batch, 1, rows, cached + rows, dtype=torch.bool)
    keys = torch.zeros(config.layers, batch, config.num_kv_heads, cached, config.dim)
    auto = torch.export.Dim.DYNAMIC
    shapes = {
        "tokens": {0: auto, 1: auto},
        "positions": {0: auto, 1: auto},
        "reads": {0: auto, 2: auto, 3: auto},
        "keys": {1: auto, 3: auto},
        "values": {1: auto, 3: auto},
    }
    example = (tokens, tokens.clone(), reads, keys, keys.clone())  # a tensor given twice would be one input
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # sizes of 1 are not set apart
        return torch.export.export(step, example, dynamic_shapes=shapes)


class _Beside(Cache):
    """Keys and values given from outside, read in front of those of the pass, which are kept apart."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = list(keys.unbind()), list(values.unbind())
        self.new_keys: list[Tensor] = []
        self.new_values: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.new_keys.append(k)
        self.new_values.append(v)
        return torch.cat((self.keys[layer], k), dim=2), torch.cat((self.values[layer], v), dim=2)
