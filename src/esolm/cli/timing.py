"""`esolm bench` and `esolm bench-training`."""

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from esolm.cli.parsing import DtypeName, Flag, Maybe
from esolm.cli.terminal import bars, console, device_of, print_json, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from esolm.algorithms import Algorithm
    from esolm.bench.learning import Learning
    from esolm.bench.writing import Setting, Writing


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is written. Several values of an option give a table of all combinations."""

    length: tuple[int, ...] = (256,)
    """Tokens of a text."""
    vocab_size: tuple[int, ...] = (4096,)
    """Ids, the mask included."""
    width: tuple[int, ...] = (384,)
    """Of the network."""
    batch: tuple[int, ...] = (1,)
    """Texts written together."""
    num_steps: tuple[int, ...] = (0,)
    """Diffusion steps (of each block, for bd3lm); 0 is one token a step."""
    layers: int = 6
    """Of the network."""
    heads: int = 6
    """Of its attention."""
    alpha_0: float = 0.25
    """Eso-LM's share of the text that diffusion writes."""
    block_size: int = 16
    """BD3-LM's block."""

    def all(self) -> "list[Setting]":
        """Every combination."""
        from esolm.bench.writing import Setting

        sizes = product(self.length, self.vocab_size, self.width, self.batch, self.num_steps)
        return [
            Setting(length=n, vocab_size=v, width=w, batch=b, num_steps=t or None, layers=self.layers, heads=self.heads)
            for n, v, w, b, t in sizes
        ]

    def method(self, name: str) -> "Algorithm":
        """A method with those of the options that it has."""
        from esolm import recipes

        alpha_0 = self.alpha_0 if name in ("esolm-a", "esolm-b") else None
        return recipes.method(name, alpha_0, self.block_size if name == "bd3lm" else None)


_SETTINGS = Settings()


def bench(
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = (
        "ar",
        "mdlm",
        "bd3lm",
        "esolm-a",
        "esolm-b",
    ),
    settings: Annotated[Settings, tyro.conf.arg(name="")] = _SETTINGS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    dtype: DtypeName = "auto",
    device: str = "auto",
    repeats: int = 5,
    json: Flag = False,
    plot: Maybe[Path] = None,
) -> None:
    """How fast the methods write on this machine, beside what the machine allows.

    Examples:

      esolm bench
      esolm bench --methods esolm-b mdlm --length 256 1024 --vocab-size 257
      esolm bench --methods esolm-b --vocab-size 50258 --batch 1 8 --dtype bfloat16 --plot speed.png

    In Python:

      from esolm.bench import writing
      found = writing.measure([("esolm-b", EsoLM())], [writing.Setting(length=256)])

    Args:
        methods: Which methods; also classes of your own file, which --with FILE.py names.
        settings: What is written.
        temperature: Of the draws.
        top_p: Of the draws.
        dtype: Of the products; auto asks the CPU.
        device: auto, cpu, cuda, cuda:1, ...
        repeats: Timings of each; the median counts.
        json: Print JSON lines instead of a table.
        plot: Draw the speeds into this file (.png, .svg, .pdf).
    """
    from esolm.bench import plot as picture
    from esolm.bench import writing
    from esolm.draw import Draw

    if plot is not None:
        picture.check(plot)
    found = writing.measure(
        [(name, settings.method(name)) for name in methods],
        settings.all(),
        dtype=dtype,
        draw=Draw(temperature=temperature, top_p=top_p),
        repeats=repeats,
        device=device_of(device),
        console=bars(),
    )
    _tell(found, writing.table(found), json=json)
    if plot is not None:
        picture.draw(found, plot)
        say(f"drawn into {plot}")


def bench_training(
    length: int = 256,
    vocab_size: int = 4096,
    width: int = 384,
    layers: int = 6,
    heads: int = 6,
    batch_size: int = 16,
    repeats: int = 5,
    json: Flag = False,
) -> None:
    """How fast the methods learn on this machine, beside its rate of matrix products.

    Examples:

      esolm bench-training
      esolm bench-training --length 1024 --vocab-size 50258 --batch-size 4

    In Python:

      from esolm.bench import learning
      found = learning.measure(width=384, length=256)

    Args:
        length: Tokens of a text.
        vocab_size: Ids, the mask included.
        width: Of the network.
        layers: Of the network.
        heads: Of its attention.
        batch_size: Texts of a step.
        repeats: Timings of each; the median counts.
        json: Print JSON lines instead of a table.
    """
    from esolm.bench import learning

    found = learning.measure(
        width=width,
        layers=layers,
        heads=heads,
        length=length,
        vocab_size=vocab_size,
        batch_size=batch_size,
        repeats=repeats,
        console=bars(),
    )
    _tell(found, learning.table(found), json=json)


def _tell(found: "Writing | Learning", shown: "RenderableType", *, json: bool) -> None:
    """The machine and the rows: JSON lines, or a line and a table."""
    if json:
        print_json({"machine": asdict(found.machine), "repeats": found.repeats})
        for row in found.rows:
            print_json(row.values())
        return
    machine = found.machine
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in machine.gemm.items())
    reads = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in machine.gemv.items())
    out = console(stderr=False)
    out.print(shown)
    out.print(
        f"Medians of {found.repeats} on {machine.cpu}, {machine.threads} threads; "
        f"a large copy {machine.bandwidth / 1e9:.1f} GB/s; "
        f"products of many rows, GFLOP/s: {rates}; of one row, GB/s of weights: {reads}",
        highlight=False,
        style="dim",
    )
