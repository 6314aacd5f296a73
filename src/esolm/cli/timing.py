"""`esolm bench` and `esolm bench-training`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from esolm.cli.parsing import DtypeName, Flag, Maybe, MethodName, MethodNames
from esolm.cli.terminal import bars, console, device_of, print_json, refuse_unwritable, say

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

    def with_defaults(self) -> dict[str, tuple[object, object]]:
        """Each option's value and default."""
        return {f.name: (getattr(self, f.name), f.default) for f in fields(self)}

    def method(self, name: str) -> "Algorithm":
        """A method with those of the options that it has."""
        from esolm import recipes

        alpha_0 = self.alpha_0 if name.startswith("esolm") else None
        return recipes.method(name, alpha_0, self.block_size if name == "bd3lm" else None)


_METHODS = ("ar", "mdlm", "bd3lm", "esolm-a", "esolm-b")
_SETTINGS = Settings()


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Long texts beside the published ratios, in place of the table of speeds."""

    headline: Flag = False
    """Time long texts, one token an evaluation, beside the published ratios. Takes the options below and dtype,
    device, json and plot."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens of the long texts."""
    check_length: int = 256
    """Tokens of the texts on which estimates are compared with the truth first."""
    whole_seconds: float = 60.0
    """A text that would take longer is estimated: 12 places of each phase are timed, and a curve is summed."""
    network: tuple[int, int, int, int] = (4, 256, 4, 4096)
    """Layers, width, heads and vocabulary of the one network for all methods."""
    share: float = 1.0
    """Eso-LM's alpha_0."""
    out: Maybe[Path] = None
    """Keep rows, headline.md and headline.json in this folder; an interrupted run goes on there."""

    def refuse_unused(self, others: Mapping[str, tuple[object, object]]) -> None:
        """ValueError for an option that would change nothing; `others` are values and defaults."""
        if self.headline:
            unused = [name for name, (value, default) in others.items() if value != default]
            told = "has no place beside --headline: see its own options in --help"
        else:
            unused = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            told = "is an option of --headline: add that, or leave it out"
        if unused:
            raise ValueError(f"--{unused[0].replace('_', '-')} {told}")

    def measure(self, dtype: DtypeName, device: str, *, json: bool, plot: Path | None) -> None:
        """Time, and show what there is, also when it is interrupted."""
        from esolm.bench import headline

        layers, width, heads, vocab_size = self.network
        settings = headline.Settings(
            lengths=self.lengths,
            check_length=self.check_length,
            whole_seconds=self.whole_seconds,
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            heads=heads,
            alpha_0=self.share,
            dtype=dtype,
        )
        if self.out is not None:
            refuse_unwritable(self.out)
        found = None
        try:
            for so_far in headline.measure(settings, device=device_of(device), folder=self.out, console=bars()):
                found = so_far
        finally:
            if found is not None and found.rows:
                if self.out is not None:
                    headline.keep(found, self.out)
                if json:
                    print_json(found.values())
                else:
                    console(stderr=False).print(headline.table(found))
        if found is not None:
            _draw(headline.draw, found, plot)


_HEADLINE = Headline()


def bench(
    methods: MethodNames = _METHODS,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = _SETTINGS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    dtype: DtypeName = "auto",
    device: str = "auto",
    repeats: int = 5,
    json: Flag = False,
    plot: Maybe[Path] = None,
    headline: Annotated[Headline, tyro.conf.arg(name="")] = _HEADLINE,
) -> None:
    """How fast the methods write on this machine, beside what the machine allows.

    Examples:

      esolm bench
      esolm bench --methods esolm-b mdlm --length 256 1024 --vocab-size 257
      esolm bench --methods esolm-b --batch 1 8 --dtype bfloat16 --plot speed.png
      esolm bench --headline --out headline --plot growth.png

    In Python:

      from esolm.bench import writing
      found = writing.measure([("esolm-b", EsoLM())], [writing.Setting(length=256)])

    Args:
        methods: Which methods.
        settings: What is written.
        temperature: Of the draws.
        top_p: Of the draws.
        dtype: Of the products; auto asks the CPU.
        device: auto, cpu, cuda, cuda:1, ...
        repeats: Timings of each; the median counts.
        json: Print JSON lines instead of a table.
        plot: Draw the speeds into this file (.png, .svg, .pdf).
        headline: Long texts.
    """
    options = {"methods": (methods, _METHODS), "temperature": (temperature, 1), "top_p": (top_p, 1)}
    headline.refuse_unused({**options, "repeats": (repeats, 5), **settings.with_defaults()})
    from esolm.bench import plot as picture
    from esolm.bench import writing
    from esolm.draw import Draw

    if plot is not None:
        picture.check(plot)
    if headline.headline:
        headline.measure(dtype, device, json=json, plot=plot)
        return
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
    _draw(picture.draw, found, plot)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a step grows, of one method, in place of the table of methods. The options above give what stays."""

    scaling: Flag = False
    """Time steps against width, length, vocabulary and ranks, and fit exponents. Takes the options below."""
    method: MethodName = "esolm-b"
    """Which method."""
    alpha_0: Maybe[float] = None
    """Eso-LM's share of the text that diffusion writes (its default: 0.25)."""
    widths: tuple[int, ...] = (128, 192, 256, 384, 512)
    """Widths of the network; the size of a head stays."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Tokens of a text."""
    vocab_sizes: tuple[int, ...] = (512, 2048, 8192, 16_384, 50_258)
    """Ids, the mask included."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Processes that train together on this machine, replicated and in shards; 1 leaves them out."""
    threads: Maybe[int] = None
    """Of each rank; left out, they share this process's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; auto asks the CPU."""
    quick: Flag = False
    """A small grid in place of all sizes: seconds, to see that it runs."""
    plot: Maybe[Path] = None
    """Draw it into this file (.png, .svg, .pdf), a panel for each axis."""

    def refuse_unused(self, sizes: Mapping[str, tuple[object, object]]) -> None:
        """ValueError for an option that would change nothing; `sizes` are values and defaults of those beside it."""
        mine = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        told = "is an option of --scaling: add that, or leave it out"
        if self.scaling:
            grid = ("widths", "lengths", "vocab_sizes", "ranks")
            mine = {**sizes, **{name: mine[name] for name in grid}} if self.quick else {}
            told = "has no place beside --quick, which sets all sizes"
        if unused := [name for name, (value, default) in mine.items() if value != default]:
            raise ValueError(f"--{unused[0].replace('_', '-')} {told}")

    def measure(self, sizes: Mapping[str, int], repeats: int, *, json: bool) -> None:
        """Time, show and draw."""
        from esolm import recipes
        from esolm.bench import growth, plot, scaling

        if self.plot is not None:
            plot.check(self.plot)
        grid = {name: getattr(self, name) for name in ("widths", "lengths", "vocab_sizes", "ranks")}
        settings = scaling.Settings(
            algorithm=recipes.method(self.method, self.alpha_0),
            repeats=repeats,
            threads=self.threads,
            dtype=self.dtype,
            **(scaling.QUICK if self.quick else {**sizes, **grid}),
        )
        found = scaling.measure(settings, console=bars())
        if json:
            print_json(found.values())
        else:
            console(stderr=False).print(growth.table(found), highlight=False)
        _draw(growth.draw, found, self.plot)


_SCALING = Scaling()


def bench_training(
    length: int = 256,
    vocab_size: int = 4096,
    width: int = 384,
    layers: int = 6,
    heads: int = 6,
    batch_size: int = 16,
    repeats: int = 5,
    json: Flag = False,
    scaling: Annotated[Scaling, tyro.conf.arg(name="")] = _SCALING,
) -> None:
    """How fast the methods learn on this machine, beside its rate of matrix products; and how a step grows.

    Examples:

      esolm bench-training
      esolm bench-training --length 1024 --vocab-size 50258 --batch-size 4
      esolm bench-training --scaling --plot growth.png
      esolm bench-training --scaling --method mdlm --widths 256 512 1024 --ranks 1 --json
      esolm bench-training --scaling --quick

    In Python:

      from esolm.bench import learning, scaling
      found = learning.measure(width=384, length=256)
      grown = scaling.measure(scaling.Settings(algorithm=EsoLM(), widths=(128, 256, 512), ranks=(1, 2)))

    Args:
        length: Tokens of a text.
        vocab_size: Ids, the mask included.
        width: Of the network.
        layers: Of the network.
        heads: Of its attention.
        batch_size: Texts of a step.
        repeats: Timings of each; the median counts.
        json: Print JSON lines instead of a table.
        scaling: How a step grows.
    """
    from esolm.bench import learning

    sizes = {
        "length": (length, 256),
        "vocab_size": (vocab_size, 4096),
        "width": (width, 384),
        "layers": (layers, 6),
        "heads": (heads, 6),
        "batch_size": (batch_size, 16),
    }
    scaling.refuse_unused(sizes)
    given = {name: value for name, (value, _) in sizes.items()}
    if scaling.scaling:
        scaling.measure(given, repeats, json=json)
        return
    found = learning.measure(**given, repeats=repeats, console=bars())
    _tell(found, learning.table(found), json=json)


def _draw(picture: Callable[[Any, Path], None], found: object, path: Path | None) -> None:
    if path is not None:
        picture(found, path)
        say(f"drawn into {path}")


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
