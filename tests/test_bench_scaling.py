"""How a step grows: a known exponent is found, every axis is measured and shown, and ranks end with the command."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from esolm import own
from esolm.algorithms import AR, BD3LM, EsoLM
from esolm.bench import growth, scaling
from esolm.bench.scaling import QUICK, Axis, Job, Row, Scaling, Settings, fitted
from esolm.bench.steps import Timed, World
from esolm.cli import main

TINY = {**QUICK, "widths": (8, 16), "lengths": (8, 16), "vocab_sizes": (32, 64), "width": 16, "length": 8, "heads": 2}
TINY |= {"vocab_size": 32, "layers": 1}
SMALL = Settings(**TINY, repeats=2)


def test_a_power_is_found_without_error():
    found = fitted([64, 128, 256, 512], [3e-9 * x**1.7 for x in (64, 128, 256, 512)])
    assert found.exponent == pytest.approx(1.7) and found.last == pytest.approx(1.7)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_that_of_least_squares():
    """Against the textbook's formula on logarithms 0, 1, 2, 3 and 0, 2, 1, 4."""
    found = fitted([math.exp(u) for u in (0, 1, 2, 3)], [math.exp(v) for v in (0, 2, 1, 4)])
    assert found.exponent == pytest.approx(1.1)
    residuals = [v - (1.75 + 1.1 * (u - 1.5)) for u, v in enumerate((0, 2, 1, 4))]
    assert found.error == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 2 / 5))
    assert found.last == pytest.approx(3)


def test_two_points_have_no_error_and_one_no_exponent():
    assert fitted([1, 2], [1, 8]).error is None and fitted([1, 2], [1, 8]).exponent == pytest.approx(3)
    with pytest.raises(ValueError, match="an exponent needs two different values"):
        fitted([4, 4], [1, 2])


def test_one_thing_changes_along_an_axis_and_heads_keep_their_size():
    plan = Settings(lengths=(64, 128), batch_size=8).plan()
    networks = {name: [job.run.network for job in jobs] for name, (_, jobs) in plan.items()}
    assert [network.width for network in networks["width"]] == [128, 192, 256, 384, 512]
    assert {network.dim for network in networks["width"]} == {64}
    assert {(n.width, n.vocab_size) for n in networks["length"]} == {(384, 4096)}
    assert {(n.width, n.length) for n in networks["vocabulary"]} == {(384, 256)}
    batches = {name: [job.run.batch_size for job in jobs] for name, (of, jobs) in plan.items() if of == "ranks"}
    assert batches == {
        "ranks, strong": [8, 8, 8],
        "shards, strong": [8, 8, 8],
        "ranks, weak": [2, 4, 8],
        "shards, weak": [2, 4, 8],
    }


def test_an_axis_of_one_value_is_left_out():
    assert list(Settings(widths=(384,), ranks=(1,)).plan()) == ["length", "vocabulary"]
    with pytest.raises(ValueError, match="nothing grows: give two values of an axis"):
        scaling.measure(Settings(widths=(384,), lengths=(256,), vocab_sizes=(4096,), ranks=(2,)))


@pytest.fixture
def clock(monkeypatch):
    """Steps that take what they are said to take, and the order in which they are taken."""
    taken: list[tuple[Job, int]] = []

    def part(ranked):
        def takers(settings, jobs, worlds):
            def taker(job):
                def take(turn):
                    taken.append((job, turn))
                    seconds = 1e-3 * job.run.network.width * (1 + 0.01 * turn) * (100 if turn == 0 else 1)
                    return Timed(seconds=seconds, cores=1.5)

                return take

            return {job: (3, taker(job)) for job in jobs}

        return takers

    for name in ("_here", "_ranked"):
        monkeypatch.setattr(scaling, name, part(name))
    monkeypatch.setattr(scaling, "gemm", lambda dtype: 1e9)
    return taken


def test_steps_are_taken_in_turns_and_the_first_turn_warms_up(clock):
    settings = Settings(**{**TINY, "ranks": (1,), "lengths": (8,), "vocab_sizes": (32,)}, repeats=3)
    (axis,) = scaling.measure(settings).axes
    assert [turn for _, turn in clock] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [job.run.network.width for job, _ in clock] == [8, 16] * 4
    assert axis.values == [8, 16]
    assert [row.seconds for row in axis.rows] == pytest.approx([8.16e-3, 16.32e-3])
    assert axis.seconds.exponent == pytest.approx(1) == axis.processor.exponent
    assert [row.processor for row in axis.rows] == pytest.approx([1.5 * row.seconds for row in axis.rows])
    for row in axis.rows:
        assert row.fastest == pytest.approx(row.seconds * 1.01 / 1.02)
        assert row.slowest == pytest.approx(row.seconds * 1.03 / 1.02)
        assert row.tokens_per_second == pytest.approx(4 * 8 / row.seconds)
        assert 0.9 < row.share / (row.flops / row.seconds / 1e9) < 1.1
    assert 1 < axis.flops.exponent < 2


FOUND = Scaling(
    settings=SMALL,
    machine="AVX2",
    cores=2,
    load=3.0,
    dtype="float32",
    rate=1e9,
    axes=tuple(
        Axis(
            name=name,
            of=of,
            rows=tuple(
                Row(
                    **{"width": 8, "length": 8, "vocab_size": 32, "batch_size": 4, "ranks": 1, "threads": 1, of: n},
                    sharded=False,
                    seconds=0.01 * n**0.5,
                    fastest=0.009 * n**0.5,
                    slowest=0.02 * n**0.5,
                    tokens_per_second=3200 / n**0.5,
                    cores=1.9,
                    processor=0.02 * n**0.75,
                    flops=1e6 * n,
                    share=0.25,
                )
                for n in (1, 2, 4)
            ),
        )
        for name, of in (("width", "width"), ("ranks, strong", "ranks"))
    ),
)


def test_the_table_has_every_axis_with_both_exponents_and_what_to_know():
    console = Console(width=80, record=True)
    console.print(growth.table(FOUND))
    text = console.export_text()
    for word in (
        "width",
        "ranks, strong",
        "exponent",
        "0.50",
        "1.00",
        "processor",
        "0.75",
        "± 0.00",
        "14.1",
        "4 x 1",
        "25%",
    ):
        assert word in text
    assert "2 cores are fewer than the threads of 4 ranks, which share them" in " ".join(text.split())
    assert "the load was 3.0" in text and "…" not in text


def test_a_panel_for_every_axis_on_logarithmic_scales(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    growth.draw(FOUND, tmp_path / "p.png")
    panels = [panel for panel in drawn[0].axes if panel.get_visible()]
    assert [panel.get_xlabel() for panel in panels] == ["width", "ranks"]
    assert {(panel.get_xscale(), panel.get_yscale()) for panel in panels} == {("log", "log")}
    assert [panel.get_ylabel() for panel in panels] == ["seconds a step", "tokens a second"]
    line = panels[0].lines[1].get_ydata()
    assert line == pytest.approx([0.01, 0.01 * 2**0.5, 0.02])


def test_the_command_measures_everything_with_two_ranks(tmp_path, capsys):
    sizes = ["--widths", 8, 16, "--lengths", 8, 16, "--vocab-sizes", 32, 64, "--ranks", 1, 2, "--threads", 1]
    network = ["--width", 16, "--length", 8, "--vocab-size", 32, "--layers", 1, "--heads", 2, "--batch-size", 4]
    picture = tmp_path / "growth.png"
    words = ["bench-training", "--scaling", "--json", "--repeats", 1, "--plot", picture, *sizes, *network]
    main([str(word) for word in words])
    told = json.loads(capsys.readouterr().out)
    assert picture.stat().st_size > 10_000
    assert told["settings"]["algorithm"] == repr(EsoLM())
    assert {"machine", "cores", "load", "dtype", "rate"} <= told.keys()
    assert [axis["axis"] for axis in told["axes"]] == [
        *("width", "length", "vocabulary"),
        *("ranks, strong", "shards, strong", "ranks, weak", "shards, weak"),
    ]
    for axis in told["axes"]:
        assert (
            len(axis["rows"]) == 2
            and {"exponent", "error", "last"}
            == axis["seconds"].keys()
            == axis["flops"].keys()
            == axis["processor"].keys()
        )
        for row in axis["rows"]:
            assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] and row["flops"] > 0 and row["share"] > 0
            assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * row["length"] / row["seconds"])
            assert 0 < row["cores"] < 2 * row["threads"] * row["ranks"] + 1
        first, second = axis["rows"]
        if axis["of"] == "ranks":
            assert (first["ranks"], second["ranks"], second["sharded"]) == (1, 2, axis["axis"].startswith("shards"))
            grows = "weak" in axis["axis"]
            assert (first["batch_size"], second["batch_size"]) == ((2, 4) if grows else (4, 4))
            assert (second["flops"] > 1.5 * first["flops"]) == grows


def test_a_rank_that_dies_is_named_and_none_is_left():
    run = Settings(**TINY).run
    with World(run, 2, 1) as world:
        assert world.take(0, 4, sharded=False).seconds > 0
        processes = [rank.pid for rank in world._ranks]
        os.kill(processes[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ChildProcessError, match="rank 1 of 2 failed: killed"):
            for number in range(1, 100):
                world.take(number, 4, sharded=False)
        assert time.monotonic() - began < 60
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]


def test_ranks_end_when_nobody_can_ask_them_any_more():
    """As when the process that started them is killed, and cleans up nothing."""
    with World(Settings(**TINY).run, 1, 1) as world:
        world._ranks[0].stdin.close()
        assert world._ranks[0].wait(timeout=120) == 0


def test_a_method_of_ones_own_is_known_to_ranks(tmp_path):
    file = tmp_path / "reversed_method.py"
    file.write_text("from dataclasses import dataclass\nfrom esolm.algorithms import Algorithm\n\nclass Mine: ...\n")
    own.define(str(file))
    assert own.source(sys.modules["esolm_own_reversed_method"].Mine) == str(file)
    assert own.source(AR) is None and own.source(Path) == "pathlib"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"widths": (100,)}, r"widths must be multiples of the size of a head, 64 numbers .*, got 100"),
        ({"widths": (64, 64)}, r"widths must be different ones, at least one, got \[64, 64\]"),
        ({"lengths": ()}, r"lengths must be different ones, at least one, got \[\]"),
        ({"lengths": (0, 8)}, "lengths must be at least 1, got 0"),
        ({"vocab_sizes": (1, 8)}, "vocab_size must be at least 2, got 1"),
        ({"ranks": (0, 1)}, "ranks must be at least 1, got 0"),
        ({"ranks": (1, 32)}, "a batch of 16 texts is too small for 32 ranks: raise batch_size"),
        ({"repeats": 0, "threads": 0}, "repeats must be at least 1, got 0; threads must be at least 1, got 0"),
        ({"algorithm": BD3LM(block_size=16), "lengths": (24,)}, "24"),
        ({"width": 33}, "width 33 must be divisible by heads 6"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        Settings(**changes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--widths 64 128", "--widths is an option of --scaling: add that, or leave it out"),
        ("--quick", "--quick is an option of --scaling"),
        ("--scaling --quick --width 64", "--width has no place beside --quick, which sets all sizes"),
        ("--scaling --quick --ranks 1", "--ranks has no place beside --quick"),
        ("--scaling --widths 100", "widths must be multiples of the size of a head"),
        ("--scaling --ranks", "--ranks needs a value"),
        ("--scaling --ranks 1 two", "--ranks: expected whole numbers, got '1', 'two'"),
        ("--scaling --method esolm-c", "there is no method 'esolm-c'; did you mean 'esolm-b'"),
        ("--scaling --method ar --alpha-0 0.5", "ar has no alpha_0; esolm-a and esolm-b have"),
        ("--scaling --plot p.xyz", "a picture must end in .png"),
        ("--scaling --dtype float16", "--dtype is one of auto, float32, bfloat16, got 'float16'"),
        ("--scaling --lengths 256 --widths 384 --vocab-sizes 4096 --ranks 1", "nothing grows: give two values"),
    ],
)
def test_mistakes_are_one_line(options, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench-training", *options.split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and told in error and error.count("\n") == 1


def test_the_default_method_is_the_papers():
    assert Settings().algorithm == EsoLM()
