"""`esolm plan` says beforehand what training takes: its peaks are those that real steps reach, measured by torch's
profiler, which sees every allocation and every release of one thread. What ranks and gloo's threads take is measured as
resident memory, in processes whose malloc gives large arrays back at once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esolm import calibrate, kernels, plain, planning
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.cli import main
from esolm.denoiser import Config
from esolm.ledger import Ledger
from esolm.memory import TooLarge
from esolm.optim import Config as Optim
from esolm.rehearsal import Rehearsal
from esolm.run import Run
from esolm.state import State
from esolm.tokenizer import Tokenizer
from worlds import Worlds

METHODS = {"AR": AR(), "MDLM": MDLM(), "BD3-LM": BD3LM(block_size=16), "Eso-LM (B)": EsoLM(alpha_0=0.25)}
SMALL = Config(vocab_size=2000, length=64, width=128, layers=2, heads=4)
LARGER = Config(vocab_size=2000, length=128, width=128, layers=4, heads=4)
RUN = Run(algorithm=AR(), network=SMALL, num_steps=100, batch_size=8, dtype="float32")
TINY = replace(RUN, network=Config(vocab_size=258, length=16, width=16, layers=2, heads=2))
SHORT = ("--set", "network.length=16", "network.layers=1")
BF16 = ("dtype=bfloat16",)

MEASURE = """
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from esolm import plain
from esolm.algorithms.algorithm import Batch
from esolm.rehearsal import Rehearsal
from esolm.run import Run
from esolm.state import State
from esolm.train import autocast, learn

def measured(run):
    tokens = torch.zeros(run.batch_size, run.network.length, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        state = State(run, None, torch.device("cpu"), None)
        for step in range(3):
            with autocast(state.working, state.denoiser.device):
                learn(state.working, state.denoiser, Batch.of(tokens), step, ranks=state.ranks)
            state.update(1e-4)
    live = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most

def planned(run):
    found = Rehearsal(run, 1, "cpu").of(run.micro_batch)
    return found.total - found.saving - found.kernels  # these steps save nothing, and oneDNN's memory is not torch's

for data in json.loads(sys.argv[1]):
    run = plain.from_plain(Run, data)
    print("peaks", planned(run), measured(run), flush=True)
"""


def peaks(runs):
    """What is planned for these runs and what their steps reach, in a process without checks of shapes, which are slow
    where calls are many and small."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(plain.to_plain(runs))],
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("peaks ")]


def test_the_plan_is_the_peak_that_real_steps_reach():
    runs = [replace(RUN, algorithm=method, micro_batch=micro) for method in METHODS.values() for micro in (2, 8)]
    for run, (planned, measured) in zip(runs, peaks(runs), strict=True):
        assert planned == pytest.approx(measured, rel=0.05), run


KINDS = {
    "": {},
    "bf16": {"dtype": "bfloat16"},
    "recompute": {"recompute": True},
    "dropout": {"network": replace(LARGER, dropout=0.1)},
    "width 384, 6 layers": {"network": Config(vocab_size=4096, length=256, width=384, layers=6, heads=6)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_docs_scale(kind):
    cases = [(name, micro) for name in METHODS for micro in (2, 8)]
    options = {"network": LARGER, **KINDS[kind]}
    runs = [replace(RUN, algorithm=METHODS[name], micro_batch=micro, **options) for name, micro in cases]
    for (name, micro), (planned, measured) in zip(cases, peaks(runs), strict=True):
        off = planned / measured - 1
        print(f"| {name} | {kind} | {micro} | {planned / 1e6:.1f} | {measured / 1e6:.1f} | {off:+.1%} |")
        assert planned == pytest.approx(measured, rel=0.1)


# What some steps of a run add to the resident memory of a rank; small ones before have loaded all code. Each run has
# processes of its own: another would leave kernels there, and holes that the next one fills.
RESIDENT = """
def live(name, run, count):
    import gc
    from esolm import plain
    from esolm.algorithms.algorithm import Batch
    from esolm.run import Run
    from esolm.state import State

    def resident(what):
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

    def steps(run, together, count):
        first, stop = together.rows(run.batch_size)
        tokens = torch.zeros(stop - first, run.network.length, dtype=torch.int64)
        state = State(run, None, torch.device("cpu"), None, together)
        for step in range(count):
            with training.autocast(state.working, state.denoiser.device):
                training.learn(state.working, state.denoiser, Batch.of(tokens), step, ranks=state.ranks)
            state.ranks.reduce(state.denoiser)
            state.update(1e-4)

    with ranks.joined(answer=500.0) as together, open(folder / f"{name}-{together.rank}.json", "w") as told:
        run = plain.from_plain(training.Run, run)
        steps(settings(dtype=run.dtype, shard=run.shard, algorithm=AR()), together, 2)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        steps(run, together, count)
        json.dump(resident("VmHWM") - before, told)
"""
LISTED = Config(vocab_size=4000, length=128, width=128, layers=4, heads=4)
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")


@pytest.fixture
def worlds(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with Worlds(tmp_path, RESIDENT) as found:
        yield found


def residents(worlds, ranks, run, count=3):
    """What is planned for a run and what its steps add, on the rank that took the most."""
    assert worlds.codes("run", ranks, run=plain.to_plain(run), count=count) == [0] * ranks, worlds.told("run", 0)
    told = [json.loads((worlds.folder / f"run-{rank}.json").read_text()) for rank in range(ranks)]
    found = Rehearsal(run, ranks, "cpu").of(run.micro_batch)
    return found.total - found.saving, max(told)


@needs_proc
def test_the_plan_is_the_peak_of_two_ranks_in_shards(worlds):
    run = replace(RUN, network=LISTED, micro_batch=4, shard=True)
    planned, measured = residents(worlds, 2, run)
    assert planned == pytest.approx(measured, rel=0.1)


NETWORKS = {"many layers": replace(LISTED, layers=8), "many ids": replace(LISTED, vocab_size=20_000, layers=2)}


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["one rank, bf16", "replicated, bf16", "replicated", "shards"])
def test_the_table_of_ranks(worlds, kind, network):
    ranks = 1 if "one" in kind else 2
    cases = [(name, micro) for name in ("AR", "Eso-LM (B)") for micro in (2, 4)]
    options = {
        "network": NETWORKS[network],
        "shard": kind == "shards",
        "dtype": "bfloat16" if "bf" in kind else "float32",
    }
    runs = [replace(RUN, algorithm=METHODS[name], micro_batch=micro, **options) for name, micro in cases]
    found = [residents(worlds, ranks, run, count=20 if "bf16" in kind else 3) for run in runs]
    for (name, micro), (planned, measured) in zip(cases, found, strict=True):
        off = planned / measured - 1
        print(f"| {name} | {kind}, {network} | {micro} | {planned / 1e6:.1f} | {measured / 1e6:.1f} | {off:+.1%} |")
        assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("average", [None, 0.999])
def test_what_stays_is_what_a_state_holds_and_saves(average):
    run = replace(TINY, optim=Optim(average=average))
    state = State(run, Tokenizer.bytes(), torch.device("cpu"), None)
    found, saved = Rehearsal(run, 1, "cpu").of(1), state.snapshot()
    bytes_of = [sum(x.nbytes for x in part.values() if x.ndim) for part in (saved.model, saved.ema or {}, saved.optim)]
    assert [found.weights, found.average, found.moments] == bytes_of
    assert found.saving == sum(bytes_of)


def test_the_largest_micro_batch_fits_and_one_text_more_does_not():
    run = replace(TINY, batch_size=32)
    rehearsal = Rehearsal(run, 1, "cpu")
    for texts in (1, 20):
        found = planning.plan(run, memory=float(rehearsal.of(texts).total), reserve=0.0)
        assert found.best.micro_batch == texts
        assert found.best.total <= found.memory < rehearsal.of(texts + 1).total


def test_a_share_of_the_memory_stays_free():
    run = replace(TINY, batch_size=64)
    memory = float(Rehearsal(run, 1, "cpu").of(40).total)
    assert planning.plan(run, memory=memory, reserve=0.3).best.total <= 0.7 * memory
    found = planning.plan(run, memory=memory)
    assert found.reserve == pytest.approx(1 / 3)
    assert 0.6 * memory < found.best.total <= 2 / 3 * memory


def test_shards_are_smaller_and_whole_gradients_of_several_passes_are_not():
    run = replace(TINY, shard=True, batch_size=16, micro_batch=4)
    whole, parts = Rehearsal(replace(run, shard=False), 4, "cpu").of(4), Rehearsal(run, 4, "cpu").of(4)
    assert parts.weights == parts.average == pytest.approx(whole.weights / 4, rel=0.02)
    assert parts.moments == 2 * parts.weights
    assert parts.gathered > 0
    assert Rehearsal(run, 8, "cpu").of(2).gradients < Rehearsal(run, 8, "cpu").of(1).gradients == whole.gradients


def test_a_ledger_forgets_what_is_let_go():
    with Ledger() as ledger:
        first = torch.empty(1000)
        second = first + 1
        del first
        view = second[:10]
        assert (ledger.live, ledger.peak) == (4000, 8000)
        del second
        assert ledger.live == 4000
        del view
    assert (ledger.live, ledger.peak) == (0, 8000)


def test_a_network_that_no_machine_holds_is_planned_at_once():
    """80 billion parameters: nothing is allocated, or this would end."""
    network = Config(vocab_size=50_258, length=128, width=32_768, layers=6, heads=256)
    with pytest.raises(TooLarge, match=r"GB are missing; try --set recompute=true, --set shard=true"):
        planning.plan(replace(RUN, network=network), memory=80e9, ranks=8, device="cuda")


@pytest.mark.parametrize(("words", "found"), [("80GB", 8e10), ("24 GiB", 24 * 2**30), (".5gb", 5e8), ("512MB", 5.12e8)])
def test_sizes_have_units(words, found):
    assert planning.size(words) == found


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ("--memory 80", 2, "memory must be a size with a unit, as 80GB, 512MB or 24GiB, got '80'"),
        ("--memory lots", 2, "memory must be a size with a unit"),
        ("--memory 0GB", 2, "memory must be a size with a unit"),
        ("--memory 8GB --ranks 0", 2, "ranks must be at least 1, got 0"),
        ("--memory 8GB --ranks 99", 2, "a batch of 8 texts is too small for 99 ranks: raise batch_size"),
        ("--memory 8GB --reserve 1", 2, "reserve is the share that stays free"),
        ("--memory 1MB", 1, "GB are missing; try --set recompute=true"),
    ],
)
def test_mistakes_are_one_line(options, code, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--recipe", "family", "--vocab-size", "258", "--device", "cpu", *options.split(), *SHORT])
    error = capsys.readouterr().err
    assert end.value.code == code
    assert told in error
    assert error.count("\n") == 1


def test_the_command_tells_the_parts_and_the_largest_micro_batch(capsys):
    common = ["plan", "--recipe", "family", "--vocab-size", "258", "--device", "cpu", "--memory", "8GB"]
    common += [*SHORT, "micro_batch=2"]
    main(common)
    shown = capsys.readouterr().out
    main([*common, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert "largest micro batch: 8 (no more texts are fed at once) (uses " in shown
    assert f"{told['best']['total'] / 1e9:.3f}" in shown
    assert (told["asked"]["micro_batch"], told["largest_micro_batch"]) == (2, 8)


@needs_proc
def test_in_bf16_on_a_cpu_that_has_it_the_kernels_count():
    """One for each shape of a product: few where rows are always as many, and else as many as are kept. How near that
    is to what steps take is the table of ranks."""
    runs = [replace(RUN, algorithm=METHODS[name], network=LISTED, dtype="bfloat16") for name in ("AR", "Eso-LM (B)")]
    runs = [replace(run, micro_batch=4) for run in runs]
    few, many = (Rehearsal(run, 1, "cpu").of(4).kernels for run in runs)
    assert Rehearsal(replace(runs[1], dtype="float32"), 1, "cpu").of(4).kernels == 0
    assert Rehearsal(runs[1], 1, "cuda").of(4).kernels == 0
    assert many == kernels.KEPT * kernels.bytes_of_one()
    if not calibrate.bf16_pays(torch.device("cpu")):
        pytest.skip("THIS CPU HAS NO BF16 PRODUCTS, so that its kernels are others")
    assert 1e5 < kernels.bytes_of_one() < 5e6
    assert 10 * kernels.bytes_of_one() < few < 30 * kernels.bytes_of_one()


def test_no_more_kernels_are_kept_than_the_environment_says():
    words = (
        "import esolm, os; print(*(os.environ[f'{name}_CAPACITY'] for name in ('ONEDNN_PRIMITIVE_CACHE', 'LRU_CACHE')))"
    )
    for theirs, found in ({}, "256 256"), ({"LRU_CACHE_CAPACITY": "9"}, "256 9"):
        environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
        command = [sys.executable, "-c", words]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment | theirs)
        assert told.stdout.split() == found.split()
