"""Bits that flip, files that are cut, swapped, missing or too many: refused with exit 3, and the step before loads."""

import random
import re
import shutil
from pathlib import Path

import pytest

from esolm import checkpoint, cli
from test_checkpoint import ALL, assert_loads, of_step

FILES = (*ALL, "tokenizer.json", "manifest.json")


def flipped(step: Path, chance: random.Random) -> tuple[Path, str]:
    """One bit; the digests of before and after are told."""
    path = step / chance.choice(FILES)
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    return path, r"is damaged: expected (sha256 [0-9a-f]{64}|a digest at its end), found [0-9a-f]{64}"


def cut(step: Path, chance: random.Random) -> tuple[Path, str]:
    """The end is missing; the sizes are told (of the manifest, the digests)."""
    path = step / chance.choice(FILES)
    raw = path.read_bytes()
    path.write_bytes(raw[: chance.randrange(len(raw))])
    return path, r"is damaged: expected (\d+ bytes, found \d+|(sha256 [0-9a-f]{64}|a digest at its end), found)"


def missing(step: Path, chance: random.Random) -> tuple[Path, str]:
    path = step / chance.choice(FILES)
    path.unlink()
    return path, "is missing"


def extra(step: Path, chance: random.Random) -> tuple[Path, str]:
    names = ("notes.txt", "model.pt", "optim/shard-00001.safetensors", "optim.pkl", ".hidden", "ema.bin")
    path = step / chance.choice(names)
    path.write_bytes(chance.randbytes(40))
    return path, "is not in the manifest; move it elsewhere"


def swapped(step: Path, chance: random.Random) -> tuple[Path, str]:
    """Two files change places, or one is that of the step before."""
    one, other = (step / name for name in chance.sample([name for name in FILES if name != "manifest.json"], 2))
    if chance.random() < 0.5 and one.name != "tokenizer.json":  # which is the same in both steps
        other = step.with_name("step-000000001") / one.relative_to(step)
    if other.is_relative_to(step):
        ours, theirs = one.read_bytes(), other.read_bytes()
        one.write_bytes(theirs)
        other.write_bytes(ours)
    else:
        shutil.copy(other, one)
    return step, "is damaged: expected"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps of a run."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", of_step(step))
    return tmp_path / "run"


def refused(run: Path, damage, count: int, chance: random.Random, capsys) -> None:
    """Damage the newest step again and again: each time it is refused and named, and the step before is loaded."""
    step, whole = run / "step-000000002", run.parent / "whole"
    shutil.copytree(step, whole, dirs_exist_ok=True)
    for _ in range(count):
        place, words = damage(step, chance)
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", str(step)])
        told = capsys.readouterr().err
        assert end.value.code == 3 and len(told.splitlines()) == 1
        assert str(place) in told and re.search(words, told), told
        warned: list[str] = []
        assert checkpoint.load(run, warn=warned.append).step == 1
        assert_loads(run, 1)
        assert len(warned) == 1 and warned[0].endswith("falling back to step-000000001") and str(place) in warned[0]
        shutil.rmtree(step)
        shutil.copytree(whole, step)
    assert_loads(run, 2)


DAMAGE = [(flipped, 1000), (cut, 300), (swapped, 40), (missing, 30), (extra, 30)]


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGE])
def test_damage_is_refused_and_named_and_the_step_before_is_loaded(run, damage, capsys):
    refused(run, damage, 20, random.Random(0), capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_by_the_hundred_is_refused_and_named_and_the_step_before_is_loaded(run, capsys):
    for damage, count in DAMAGE:
        refused(run, damage, count, random.Random(), capsys)
        with capsys.disabled():
            print(f"{count} of {count} {damage.__name__}: exit 3, named, and the step before loaded")
