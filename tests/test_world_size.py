"""A run goes on with another number of ranks: the same texts in the same order, and where the ranks share the portions
of a batch that it began with, the same weights bit for bit."""

from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal
from worlds import Worlds

# Each rank notes the rows that it learns from, with their places in the global batch.
SCRIPT = """
def live(name, resume=False, **changes):
    learn = training.learn

    def learned(run, model, batch, step, levels, together):
        first, stop = together.rows(run.batch_size)
        with open(folder / f"{name}-{together.rank}.rows", "a") as rows:
            for row, tokens in zip(range(first, stop), batch.tokens.tolist(), strict=True):
                print(json.dumps([step, row, tokens]), file=rows)
        return learn(run, model, batch, step, levels, together)

    training.learn = learned
    with ranks.joined(answer=120.0) as together:
        train(settings(**changes), name, together, resume=resume)
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Worlds:
    with Worlds(tmp_path_factory.mktemp("worlds"), SCRIPT) as found:
        yield found


def lived(worlds: Worlds, name: str, half: int, sizes: tuple[int, int], **changes: object) -> None:
    """`half` steps on some ranks, and as many again on others."""
    first, second = sizes
    settings = {**changes, "save_every": half, "validate_every": half}
    assert worlds.codes(name, first, num_steps=half, **settings) == [0] * first, worlds.told(name, 0)
    assert worlds.codes(name, second, num_steps=2 * half, resume=True, **settings) == [0] * second, worlds.told(name, 0)


def rows(worlds: Worlds, name: str) -> dict[tuple[int, int], str]:
    """What stood in each place of each step's batch, in all of a run's lives; each place is some one rank's."""
    found: dict[tuple[int, int], str] = {}
    for path in worlds.folder.glob(f"{name}-*.rows"):
        for line in path.read_text().splitlines():
            step, row, tokens = line.strip("[]").split(",", 2)
            assert (int(step), int(row)) not in found
            found[int(step), int(row)] = tokens
    return found


def furthest(ours: Path, theirs: Path) -> float:
    """The largest difference of a number in two checkpoints: weights, averages, moments, update counts."""
    first, second = checkpoint.load(ours), checkpoint.load(theirs)
    largest = 0.0
    for kind in ("model", "ema", "optim"):
        one, other = getattr(first, kind), getattr(second, kind)
        assert one.keys() == other.keys() and len(one) > 10
        largest = max(largest, *(float((one[name] - other[name]).abs().max()) for name in one))
    return largest


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def compare(worlds: Worlds, half: int, began_on: int, sizes: list[int], **changes: object) -> dict[int, float]:
    """Saved on `began_on` ranks, resumed on each of `sizes`; distances of the end from the undisturbed run."""
    mark = "-".join(map(str, (began_on, half, *changes.values()))).replace(" ", "")
    straight, texts = f"{mark}-straight", changes.get("batch_size", 8)
    settings = {**changes, "save_every": half, "validate_every": half}
    assert worlds.codes(straight, began_on, num_steps=2 * half, **settings) == [0] * began_on
    assert len(rows(worlds, straight)) == 2 * half * texts
    distances = {}
    for size in sizes:
        lived(worlds, f"{mark}-{size}", half, (began_on, size), **changes)
        assert rows(worlds, f"{mark}-{size}") == rows(worlds, straight)
        distances[size] = furthest(worlds.folder / straight, worlds.folder / f"{mark}-{size}")
    saved = files(worlds.folder / straight / f"step-{half:09d}")
    assert saved == [
        *("config.json", "ema.safetensors", "manifest.json", "model.safetensors"),
        *(f"optim/shard-{rank:05d}.safetensors" for rank in range(began_on)),
        *("state.json", "tokenizer.json"),
    ]
    return distances


@pytest.mark.parametrize(
    ("sizes", "options"),
    [([1, 4], {"network": {"dropout": 0.1}, "micro_batch": 2}), ([1, 2, 4], {"shard": True})],
    ids=["replicated", "shards"],
)
def test_ranks_that_share_the_four_portions_of_a_batch_are_the_same_run_bit_for_bit(worlds, sizes, options):
    """Passes, sums, norms and what dropout drops are the same: nothing is rounded in another way."""
    assert compare(worlds, 3, 2, sizes, **options) == dict.fromkeys(sizes, 0.0)


def test_two_ranks_with_the_portion_of_one_pass_fewer_texts_at_once_and_round_otherwise(worlds):
    assert 0.0 < compare(worlds, 3, 1, [2])[2] < 1e-6


LARGE = {"batch_size": 256}  # 4,096 tokens: four portions, if nothing is said
SAID = {"micro_batch": 2}  # of 8 texts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "shards"])
@pytest.mark.parametrize(
    ("began_on", "options"),
    [(2, LARGE), (4, {}), (1, SAID), (2, {})],
    ids=["2 ranks, large", "4 ranks", "1 rank", "2 ranks"],
)
def test_twenty_steps_and_twenty_on_one_two_and_four_ranks(worlds, began_on, options, shard, seed):
    found = compare(worlds, 20, began_on, [1, 2, 4], shard=shard, seed=seed, **options)
    print(f"{'shards' if shard else 'replicated'}, {options}, seed {seed}, {began_on} ranks then n: furthest {found}")
    assert found == {1: 0.0, 2: 0.0, 4: 0.0}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "shards"])
def test_portions_that_cannot_be_dealt_out_change_rounding_only(worlds, shard):
    """Two portions, as large micro batches of a small batch have it, on four ranks: by chance above 1e-6."""
    found = [compare(worlds, 20, 2, [4], shard=shard, seed=seed, micro_batch=4)[4] for seed in range(4)]
    print(f"{'shards' if shard else 'replicated'}, two portions, 2 ranks then 4: furthest {found}")
    assert all(0.0 < distance < 1e-4 for distance in found)


def test_shards_micro_batches_and_recomputing_change_nothing_but_rounding(worlds):
    """Three texts on two ranks, one at a time, whose terms differ from rank to rank: one has a pass more."""
    few = {"batch_size": 3, "num_steps": 4, "save_every": 9}
    assert worlds.codes("plain", 1, **few) == [0]
    assert worlds.codes("all", 2, shard=True, micro_batch=1, recompute=True, **few) == [0, 0], worlds.told("all", 0)
    assert 0.0 < furthest(worlds.folder / "plain", worlds.folder / "all") < 1e-6


def test_shards_in_bf16_learn_like_a_whole_network_in_bf16(worlds):
    """Weights travel in bf16 and stay float32; the losses differ by the rounding of bf16 products."""
    few = {"dtype": "bfloat16", "num_steps": 6, "save_every": 9}
    assert worlds.codes("bf16", 1, **few) == [0]
    assert worlds.codes("bf16-shards", 2, shard=True, **few) == [0, 0], worlds.told("bf16-shards", 0)
    ours, theirs = (
        [entry["loss"] for entry in journal.read(worlds.folder / name) if "loss" in entry]
        for name in ("bf16", "bf16-shards")
    )
    assert theirs == pytest.approx(ours, abs=0.02) and ours != theirs
    assert all(
        tensor.dtype == torch.float32 for tensor in checkpoint.load(worlds.folder / "bf16-shards").model.values()
    )
