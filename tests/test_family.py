"""The family: every member a run of its own, the same tokens for each, and a call that goes on where it was."""

import pytest

from esolm import checkpoint, family, recipes
from esolm.family import MEMBERS, Member

TINY = ("network.width=16", "network.layers=1", "network.heads=2", "network.length=16", "num_steps=2", "batch_size=4")
QUICK = (*TINY, "validate_every=2", "validation_texts=2", "save_every=1", "dtype=float32")


def test_the_members_are_those_of_the_published_comparison():
    methods = {member.name: recipes.method(member.model, member.alpha_0, member.block_size) for member in MEMBERS}
    assert len(methods) == len(MEMBERS) == 16
    assert {a.block_size for a in methods.values() if hasattr(a, "block_size")} == {4, 8, 16}
    for variant in "AB":
        alphas = {a.alpha_0 for a in methods.values() if getattr(a, "variant", None) == variant}
        assert alphas == {1.0, 0.5, 0.25, 0.125, 0.0625} | ({0.0} if variant == "B" else set())
    runs = [recipes.family(method, 4096) for method in methods.values()]
    assert len({(run.network, run.num_steps, run.batch_size, run.seed, run.optim) for run in runs}) == 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = tmp_path_factory.mktemp("family") / "text.txt"
    place.write_text("To be, or not to be. \f" * 40)
    return place


def test_members_are_trained_and_a_second_call_goes_on_with_those_that_are_not(tmp_path, text, monkeypatch):
    monkeypatch.setattr(family, "_DATA", str(text))
    two = (Member(name="ar", model="ar"), Member(name="b", model="esolm-b", alpha_0=0.5))
    family.train(tmp_path, members=two[:1], settings=QUICK, vocab_size=258)
    before = (tmp_path / "ar" / "journal.jsonl").read_bytes()
    family.train(tmp_path, members=two, settings=QUICK, vocab_size=258)
    assert (tmp_path / "ar" / "journal.jsonl").read_bytes() == before
    for name in ("ar", "b"):
        assert checkpoint.load(tmp_path / name).step == 2
        assert family._step(tmp_path / name) == 2


def test_a_member_that_fails_is_named_with_the_place_of_its_words(tmp_path, text, monkeypatch):
    monkeypatch.setattr(family, "_DATA", str(text))
    wrong = (Member(name="bd3lm-5", model="bd3lm", block_size=5),)
    with pytest.raises(ChildProcessError, match=r"bd3lm-5 could not be trained: see .*words.txt"):
        family.train(tmp_path, members=wrong, settings=QUICK, vocab_size=258)
    assert "divisible" in (tmp_path / "bd3lm-5" / "words.txt").read_text()


def test_no_workers_train_nothing(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        family.train(tmp_path, workers=0)
