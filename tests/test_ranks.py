"""Several ranks are one run: what one finds all know, what one asks for all do, and what one cannot do nobody does."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal
from esolm.ranks import ALONE, Ranks, _met
from worlds import Worlds

# What goes wrong, or is asked for, on which rank and at which step.
SCRIPT = """
def live(name, resume=False, what="", who=1, at=3, answer=120.0, **changes):
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    learn, views_of, write = training.learn, training.views_of, parts.write

    def here(step):
        return rank == who and step in (at if isinstance(at, list) else [at])

    def learned(run, model, batch, step, levels, together):
        if here(step) and what == "weight":
            with torch.no_grad():
                together.own(model.embed.weight)[-1, 0] = float("nan")
        if here(step) and what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        terms = learn(run, model, batch, step, levels, together)
        if here(step) and what == "gradient":
            together.own(model.blocks[0].qkv.weight.grad)[1, 2] = float("inf")
        if here(step) and what == "loss":
            terms["sequential"] = float("nan")
        if here(step) and what == "memory":
            at.remove(step)
            raise MemoryError
        return terms

    def viewed(run, batch, step, together):
        views = views_of(run, batch, step, together)
        if here(step) and what == "batch":
            next(view for view in views if view.term == "sequential").weights[1, 2] = float("nan")
        return views

    def written(folder, file, tensors):
        if rank == who and what == "disk" and f"step-{at:09d}" in str(folder):
            raise OSError(28, "No space left on device")
        write(folder, file, tensors)

    training.learn, training.views_of, parts.write = learned, viewed, written
    with ranks.joined(answer=answer) as together:
        outcome = train(settings(**changes), name, together, resume=resume)
        told = open(folder / f"{name}-{rank}.json", "w")
        validation = outcome.validation.nats_per_token if outcome.validation else 0
        json.dump([outcome.step, outcome.interrupted, validation], told)
        told.close()
    return 75 if outcome.interrupted else 0
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Worlds:
    with Worlds(tmp_path_factory.mktemp("worlds"), SCRIPT) as found:
        yield found


def warnings(folder: Path) -> list[tuple[int, str]]:
    return [(e["step"], e["text"]) for e in journal.read(folder) if e.get("name") == "warning"]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in journal.read(folder) if "loss" in entry]


SPOILED = {
    "weight": "the weight embed.weight (rank 1) is NaN",
    "gradient": "the gradient of blocks.0.qkv.weight is infinite",
    "loss": "the loss of the sequential term (rank 1) is NaN",
    "batch": "the weights of the batch (sequential view, text 1, row 2) (rank 1) is NaN",
}


def is_found_on_all(worlds: Worlds, name: str, what: str, shard: bool, at: list[int]) -> None:
    """Each of `at` is skipped by both ranks. A weight stays as it is: both end at the third skip, nothing is saved."""
    codes = worlds.codes(name, 2, what=what, shard=shard, at=at, num_steps=max(at) + 3, save_every=1000, micro_batch=4)
    told = warnings(worlds.folder / name)
    assert all(text.startswith(f"update skipped: {SPOILED[what]}") for _, text in told)
    if what == "weight":
        assert codes == [1, 1] and [step for step, _ in told] == [at[0] + skip for skip in (1, 2, 3)]
        assert all(f"stopped at step {at[0] + 3}: 3 updates in a row" in worlds.told(name, rank) for rank in (0, 1))
        assert checkpoint.newest(worlds.folder / name) is None
    else:
        assert codes == [0, 0] and [step for step, _ in told] == [step + 1 for step in at]
        assert all(math.isfinite(loss) for loss in losses(worlds.folder / name)[:1])
        weights = checkpoint.load(worlds.folder / name).model
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


@pytest.mark.parametrize(("what", "shard"), [("weight", True), ("gradient", True), ("batch", False)])
def test_what_is_not_finite_on_one_rank_is_found_on_all_before_the_update(worlds, what, shard):
    is_found_on_all(worlds, f"one {what}", what, shard, [2])


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "shards"])
@pytest.mark.parametrize("what", [*SPOILED])
def test_at_twenty_random_steps(worlds, what, shard):
    chance = random.Random()
    at = [3 * place + chance.randrange(2) for place in range(20)]
    is_found_on_all(worlds, f"twenty {what} {shard}", what, shard, at if what != "weight" else at[:1])
    print(f"{what}, {'shards' if shard else 'replicated'}: found on both ranks before every update")


def is_agreed(worlds: Worlds, name: str, what: str, at: int, who: int, size: int, shard: bool) -> None:
    """One rank was asked to stop: all end with 75 at the same step, which is saved."""
    assert worlds.codes(name, size, what=what, at=at, who=who, num_steps=60, shard=shard) == [75] * size
    ends = [json.loads((worlds.folder / f"{name}-{rank}.json").read_text()) for rank in range(size)]
    assert ends == [[at + 1, True, 0]] * size
    assert checkpoint.load(worlds.folder / name).step == at + 1


@pytest.mark.parametrize(("what", "shard"), [("SIGTERM", False), ("SIGUSR1", True)])
def test_two_ranks_agree_on_the_step_at_which_one_is_asked_to_stop(worlds, what, shard):
    is_agreed(worlds, what, what, 6, 1, 2, shard)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ranks_agree_at_random_steps(worlds):
    chance = random.Random()
    for turn in range(30):
        what, size = ("SIGTERM", "SIGINT", "SIGUSR1")[turn % 3], (2, 2, 4)[turn // 3 % 3]
        is_agreed(worlds, f"stop {turn}", what, chance.randrange(50), chance.randrange(size), size, turn % 2 == 0)
    print("30 of 30 signals to one rank: all ranks saved the same step and ended with 75")


def test_memory_that_one_rank_lacks_makes_the_micro_batches_of_all_smaller(worlds):
    assert worlds.codes("plenty", 2, micro_batch=4) == [0, 0]
    assert worlds.codes("lacking", 2, what="memory", at=[3], micro_batch=4) == [0, 0]
    found = warnings(worlds.folder / "lacking")
    assert len(found) == 1 and found[0][1].startswith("out of memory: going on with micro batches of 2")
    assert losses(worlds.folder / "lacking") == pytest.approx(losses(worlds.folder / "plenty"), abs=1e-6)
    assert checkpoint.load(worlds.folder / "lacking").state["micro_batch"] == 2


def test_memory_that_one_rank_lacks_in_shards_ends_all_at_once(worlds):
    """The others wait for it in the midst of a pass, so there is nothing to agree by; none waits for the time-out."""
    codes, seconds = worlds.ended("shards", 2, what="memory", at=[3], shard=True, answer=60.0)
    assert codes == [1, 1] and max(seconds) - min(seconds) < 20
    assert "another rank is gone" in worlds.told("shards", 0)


def test_a_disk_that_is_full_for_one_rank_leaves_no_checkpoint_and_training_goes_on(worlds):
    assert worlds.codes("full", 2, what="disk", at=4, shard=True) == [0, 0]
    (step, words), *_ = warnings(worlds.folder / "full")
    assert step == 4 and "step-000000004: rank 1 failed: [Errno 28] No space left" in words
    assert not (worlds.folder / "full" / "step-000000004").exists()
    assert checkpoint.load(worlds.folder / "full").step == 8
    assert not [path for path in (worlds.folder / "full").iterdir() if path.name.startswith(".saving")]


def test_rows_are_dealt_out_without_gap_or_overlap():
    for total, size in ((8, 2), (8, 3), (5, 4)):
        dealt = [Ranks(rank=rank, size=size).rows(total) for rank in range(size)]
        assert [row for first, stop in dealt for row in range(first, stop)] == list(range(total))
        assert all(first < stop for first, stop in dealt)
    with pytest.raises(ValueError, match="a batch of 3 texts is too small for 4 ranks: raise batch_size"):
        Ranks(size=4).rows(3)


def test_a_process_alone_gets_back_what_it_gave():
    model = torch.nn.Linear(2, 3)
    weight = model.weight
    assert ALONE.gather([1, 2.5]) == [[1.0, 2.5]] and ALONE.sums([2.5]) == [2.5] and ALONE.words("a") == ["a"]
    assert ALONE.agree(True) and not ALONE.agree(False) and ALONE.rows(1) == (0, 1)
    assert ALONE.own(weight) is weight and ALONE.part(weight) is weight
    assert ALONE.share({"a": weight})["a"] is weight and ALONE.shard(model, [], torch.device("cpu")) is ALONE
    with pytest.raises(ValueError, match="mine"), ALONE.together():
        raise ValueError("mine")


def test_parts_are_those_of_the_shards_and_make_up_the_whole():
    """A tensor of 5 rows over 4 ranks is cut into 2, 2, 1 and none; numbers without rows are rank 0's."""
    tensors = {"weight": torch.arange(10.0).view(5, 2), "step": torch.tensor(7.0)}
    shares = [Ranks(rank=rank, size=4).share(tensors) for rank in range(4)]
    assert [len(share["weight"]) for share in shares] == [2, 2, 1, 0]
    assert torch.equal(torch.cat([share["weight"] for share in shares]), tensors["weight"])
    assert [sorted(share) for share in shares] == [["step", "weight"], *[["weight"]] * 3]


def test_ranks_that_are_started_again_do_not_meet_the_dead():
    """torchrun keeps its store, so gloo found the addresses of the last life there, and every second start failed."""
    from torch.distributed import HashStore

    store, lives = HashStore(), []
    for _ in range(3):
        store.set("hello/2", f"died before it was answered {len(lives)}")
        with ThreadPoolExecutor(3) as pool:
            names = list(pool.map(lambda rank: _met(store, rank, 3), (0, 1, 2)))
        assert len({*names}) == 1
        lives.append(names[0])
    assert len({*lives}) == 3
