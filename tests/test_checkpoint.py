"""Checkpoints: what is saved is what is loaded, and whatever fails or dies on the way, an earlier one still loads."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from esolm import checkpoint as module
from esolm import seal
from esolm.checkpoint import Checkpoint, CheckpointError, best, load, newest, save, verify
from esolm.parts import shard

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "complex64"),
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
]


def of_step(step: int, **changes: object) -> Checkpoint:
    """A small checkpoint whose every part tells its step."""
    parts = {
        "step": step,
        "model": {"weight": torch.full((3, 5), float(step)), "bias": torch.arange(4) + step},
        "ema": {"weight": torch.full((3, 5), step + 0.5)},
        "optim": {"weight.mean": torch.full((3, 5), step + 0.25), "count": torch.tensor(step)},
        "config": {"network": {"width": step, "name": "naïve"}},
        "tokenizer_json": '{"é": 1}\r\n',
        "state": {"seconds": step / 3, "origin": {"data": "text"}},
    }
    return Checkpoint(**(parts | changes))


def assert_same(found: dict[str, Tensor] | None, expected: dict[str, Tensor] | None) -> None:
    """Equal bit for bit, so that two NaNs of the same bits are equal and 0 and -0 are not."""
    if found is None or expected is None:
        assert found is expected
        return
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        theirs = expected[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs) if t.numel()]
        assert not bits or torch.equal(*bits)


def assert_loads(folder: Path, step: int) -> None:
    found, expected = load(folder, warn=lambda _: None), of_step(step)
    assert (found.step, found.config, found.state) == (step, expected.config, expected.state)
    assert found.tokenizer_json == expected.tokenizer_json
    for name in ("model", "ema", "optim"):
        assert_same(getattr(found, name), getattr(expected, name))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is saved is what is loaded -----------------------------------------------------------------------


def test_every_part_comes_back(tmp_path):
    path = save(tmp_path / "run", of_step(3))
    assert path == tmp_path / "run" / "step-000000003"
    assert_loads(path, 3)
    assert_loads(path.parent, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path, dtype):
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if kind == torch.bool else 256, (96,), dtype=torch.uint8)
    values = raw.view(kind) if kind != torch.bool else raw.bool()  # NaNs of any bits among them
    tensors = {
        "flat": values,
        "turned": values[:12].reshape(3, 4).T,
        "part": values[2:7],
        "empty": values[:0].reshape(0, 4),
        "another empty": values[:0],
        "one": values[0],
        "flat again": values,
    }
    save(tmp_path, of_step(0, model=tensors, ema=None, optim=tensors))
    found = load(tmp_path)
    assert found.ema is None
    assert_same(found.model, tensors)
    assert_same(found.optim, tensors)


def test_who_may_read_a_folder_may_read_all_of_a_checkpoint_in_it(tmp_path):
    """The library that writes tensors used to keep its files to their owner."""
    path = save(tmp_path, of_step(1))
    (tmp_path / "usual").write_text("x")
    usual = (tmp_path / "usual").stat().st_mode
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) == 7 and [file for file in files if file.stat().st_mode != usual] == []


def test_tied_parameters_come_back_each_with_its_name(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save(tmp_path, of_step(0, model={"embed": weight, "head": weight}))
    found = load(tmp_path).model
    assert not found["embed"].requires_grad and torch.equal(found["embed"], found["head"])
    assert torch.equal(found["head"], weight)


def test_the_optimizer_is_left_unread_when_it_is_not_asked_for(tmp_path):
    save(tmp_path, of_step(0))
    assert load(tmp_path, optimizer=False).optim == {}


def test_what_is_shared_needs_no_optimizer_and_no_average(tmp_path):
    path = save(tmp_path, of_step(0, ema=None, optim={}, state={}))
    found = load(path)
    assert (found.ema, found.optim, found.state) == (None, {}, {})
    assert names(path) == ["config.json", "manifest.json", "model.safetensors", "state.json", "tokenizer.json"]


@pytest.mark.parametrize("step", [-1, 10**12, True])
def test_a_step_out_of_range_is_refused(step):
    with pytest.raises(ValueError, match=r"step must be an integer in \[0, 10\^12\), got"):
        Checkpoint(step=step, model={"x": torch.ones(1)}, config={}, tokenizer_json="{}")


def test_steps_are_in_order_however_many_digits_they_have(tmp_path):
    for step in (999_999_999, 10**11):
        save(tmp_path, of_step(step), keep=2)
    assert_loads(tmp_path, 10**11)


def test_a_checkpoint_without_weights_is_refused():
    with pytest.raises(ValueError, match="model must hold at least one tensor"):
        of_step(1, model={})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": {"loss": float("nan")}}, "not plain data"),
        ({"state": {"tensor": torch.ones(1)}}, "not plain data"),
        ({"config": {"a": {1: "x", "1": "y"}}}, "could not be loaded: .*repeated|could not be loaded: .*twice"),
        ({"config": {"name": "\udce9"}}, "surrogates not allowed"),
    ],
)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path, changes, words):
    save(tmp_path, of_step(1))
    with pytest.raises(ValueError, match=words):
        save(tmp_path, of_step(2, **changes))
    assert names(tmp_path) == ["step-000000001"]
    assert_loads(tmp_path, 1)


def test_data_nested_too_deeply_to_be_loaded_are_refused_when_they_are_saved(tmp_path):
    deep: dict = {}
    for _ in range(80):
        deep = {"in": deep}
    with pytest.raises(ValueError, match="could not be loaded: JSON is nested more than 64 levels"):
        save(tmp_path, of_step(2, state=deep))
    assert names(tmp_path) == []


def test_more_tensors_than_can_be_loaded_are_refused_when_they_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_HEADER_LIMIT", 100)
    with pytest.raises(ValueError, match=r"could not be loaded: .* claims a header"):
        save(tmp_path, of_step(2))
    assert names(tmp_path) == []


# -- damage ------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swell(path: Path) -> None:
    """A header that claims two gigabytes."""
    path.write_bytes((2**31).to_bytes(8, "little") + path.read_bytes()[8:])


def link(path: Path) -> None:
    moved = path.rename(path.parent.parent.parent / f"elsewhere-{path.name}")
    path.symlink_to(moved)


ALL = ("model.safetensors", "ema.safetensors", "optim/shard-00000.safetensors", "config.json", "state.json")
DAMAGE = [(name, damage) for name in (*ALL, "tokenizer.json", "manifest.json") for damage in (flip, cut, Path.unlink)]
DAMAGE += [("model.safetensors", swell), ("model.safetensors", link), ("config.json", link)]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda part: getattr(part, "__name__", part))
def test_a_damaged_checkpoint_is_refused_and_the_file_named(tmp_path, name, damage):
    path = save(tmp_path / "run", of_step(1))
    damage(path / name)
    for read in (load, verify):
        with pytest.raises(CheckpointError, match=re.escape(str(path / name))):
            read(path)


def test_a_file_that_does_not_belong_to_a_checkpoint_is_named(tmp_path):
    path = save(tmp_path, of_step(1))
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt is not in the manifest; move it elsewhere"):
        load(path)


def test_shards_that_no_rank_wrote_are_refused(tmp_path):
    path = save(tmp_path, of_step(1))
    (path / shard(1)).write_bytes((path / ALL[2]).read_bytes())
    seal.seal(path, [*ALL, "tokenizer.json", shard(1)], step=1)
    with pytest.raises(CheckpointError, match=r"2 shards of the optimizer; state\.json tells of 1 ranks"):
        load(path)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_when_the_newest_step_is_damaged_the_one_before_is_loaded_and_it_is_told(tmp_path, damage):
    for step in (1, 2, 3):
        save(tmp_path, of_step(step))
    damage(tmp_path / "step-000000003" / "model.safetensors")
    told: list[str] = []
    assert load(tmp_path, warn=told.append).step == 2
    assert len(told) == 1 and told[0].endswith("; falling back to step-000000002")
    assert "step-000000003/model.safetensors is" in told[0]
    with pytest.warns(UserWarning, match="falling back to step-000000002"):
        assert newest(tmp_path) == tmp_path / "step-000000002"


def test_when_every_step_is_damaged_it_is_told(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, of_step(step)) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; the newest: .*step-000000002/model"):
        load(tmp_path)


def test_where_there_is_no_checkpoint_it_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent; there is no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*; expected a folder like step-000001000 in it"):
        load(tmp_path)
    assert newest(tmp_path) is None


# -- which steps there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [2, 3, 4, 5]), (None, [2, 3, 4, 5])]
)
def test_the_newest_steps_are_kept(tmp_path, keep, left):
    for step in range(2, 6):
        save(tmp_path, of_step(step), keep=keep)
    assert names(tmp_path) == [f"step-{step:09d}" for step in left]
    assert_loads(tmp_path, 5)


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
        ([1.0, 2.0, 3.0, 4.0, 0.5], [4, 5]),
        ([2.0, 1.0, 1.0, 1.0, 3.0], [2, 4, 5]),  # measured once, at step 2; the later steps carry the figure along
        ([None, 7.0, None, True, "low"], [2, 4, 5]),
        ([None] * 5, [4, 5]),
    ],
)
def test_the_best_by_validation_is_kept_beside_the_newest(tmp_path, values, left):
    for step, value in enumerate(values, 1):
        save(tmp_path, of_step(step, state={"validation": value}), keep=2)
    assert names(tmp_path) == [f"step-{step:09d}" for step in left]
    numbers = [value for value in values if isinstance(value, float)]
    assert best(tmp_path) == (tmp_path / f"step-{1 + values.index(min(numbers)):09d}" if numbers else None)


def test_a_step_that_was_not_saved_is_no_loss_to_the_best(tmp_path):
    """The best is asked of what is on disk, so a failed save or a resumed run cannot make it forget."""
    for step, value in ((1, 2.0), (3, 3.0), (4, 4.0)):  # step 2, the best, met a full disk
        save(tmp_path, of_step(step, state={"validation": value}), keep=1)
    assert names(tmp_path) == ["step-000000001", "step-000000004"]
    (tmp_path / "step-000000001" / "state.json").write_text("{")
    save(tmp_path, of_step(5, state={"validation": 5.0}), keep=1)
    assert names(tmp_path) == ["step-000000004", "step-000000005"]  # what cannot be read is not the best


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_none_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, of_step(1), keep=keep)


def test_what_cannot_be_pruned_is_told_and_the_new_step_is_safe(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, of_step(step), keep=2)
    remove = module.shutil.rmtree

    def refuse_old(path: Path, **options: bool) -> None:
        if path.name.startswith(".pruning"):
            raise OSError(errno.EIO, "broken")
        remove(path, **options)

    monkeypatch.setattr(module.shutil, "rmtree", refuse_old)
    told: list[str] = []
    save(tmp_path, of_step(3), keep=2, warn=told.append)
    assert len(told) == 1 and re.search("saved step-000000003, but older checkpoints .* could not be removed", told[0])
    assert_loads(tmp_path, 3)


def test_steps_beyond_the_one_a_run_went_on_from_are_set_aside(tmp_path):
    """A run that was resumed at step 2 must not load step 3 of its former life when it is resumed again."""
    for step in (2, 3, 4):
        save(tmp_path, of_step(step))
    save(tmp_path, of_step(2))
    assert names(tmp_path) == ["abandoned-step-000000003", "abandoned-step-000000004", "step-000000002"]
    assert_loads(tmp_path, 2)
    assert_loads(tmp_path / "abandoned-step-000000004", 4)
    save(tmp_path, of_step(3))
    save(tmp_path, of_step(2))
    assert names(tmp_path) == ["abandoned-step-000000003", "abandoned-step-000000004", "step-000000002"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, of_step(2, state={"try": 1}))
    save(tmp_path, of_step(2, state={"try": 2}))
    assert load(tmp_path).state == {"try": 2} and names(tmp_path) == ["step-000000002"]


def test_a_step_that_was_moved_away_for_one_that_never_came_is_loaded_and_gets_its_name_back(tmp_path):
    save(tmp_path, of_step(2))
    (tmp_path / "step-000000002").rename(tmp_path / ".replaced-step-000000002")
    assert_loads(tmp_path, 2)
    save(tmp_path, of_step(3))
    assert names(tmp_path) == ["step-000000002", "step-000000003"]
    assert_loads(tmp_path / "step-000000002", 2)


def test_what_crashed_saves_left_is_cleared_away_and_nothing_else(tmp_path):
    save(tmp_path, of_step(1))
    for name in (".saving-step-000000002-77", ".pruning-step-000000000", ".replaced-step-000000001", ".mine", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    save(tmp_path, of_step(2))
    assert names(tmp_path) == [".mine", "logs", "step-000000001", "step-000000002"]


def test_a_folder_holds_steps_once_one_is_saved_and_not_for_its_tokens(tmp_path):
    """A run killed before its first save was not begun anew: the folder of its tokens has a manifest too."""
    assert not module.holds_steps(tmp_path / "none")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / seal.MANIFEST).write_text("{}")
    assert not module.holds_steps(tmp_path)
    save(tmp_path, of_step(1))
    assert module.holds_steps(tmp_path)


def sealed_in_shards(path: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """A step whose optimizer was written by as many ranks as there are shards."""
    save(path.parent, of_step(1))
    state = json.loads((path / "state.json").read_text()) | {"ranks": len(shards)}
    (path / "state.json").write_text(json.dumps(state))
    for rank, tensors in enumerate(shards):
        save_file(tensors, path / shard(rank))
    names = {*ALL, "tokenizer.json", *map(shard, range(len(shards)))}
    seal.seal(path, sorted(names), step=1)
    return path


def test_the_parts_of_several_ranks_are_laid_end_to_end(tmp_path):
    whole = torch.arange(10.0).view(5, 2)
    rows = [{"a": part.clone()} for part in (whole[:2], whole[2:4], whole[4:], whole[5:])]
    path = sealed_in_shards(tmp_path / "step-000000001", rows[0] | {"step.a": torch.tensor(7.0)}, *rows[1:])
    found = load(path).optim
    assert torch.equal(found["a"], whole) and found["step.a"] == 7.0


@pytest.mark.parametrize(
    "other",
    [{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 2).half()}, {"b": torch.zeros(2, 2)}, {"s": torch.zeros(())}, {}],
    ids=["width", "dtype", "name", "number", "empty"],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path, other):
    first = {"a": torch.zeros(2, 2), "s": torch.zeros(())}
    good = {"a": torch.zeros(2, 2)}
    path = sealed_in_shards(tmp_path / "step-000000001", first, good, other)
    with pytest.raises(CheckpointError, match=r"shard-0000[12]\.safetensors does not go with the other shards"):
        load(path)
