"""Mixtures of corpora through the command line: rows by weight, recorded, gone on with bit for bit, and told."""

import numpy as np
import pytest

from esolm import checkpoint, prepare
from esolm.prepare import Mixed, Source
from test_cli import SMALL, run  # noqa: F401  (a fixture)

OPTIONS = ("--vocab-size", 258, "--set", *SMALL, "validation_texts=4", "save_every=2")


@pytest.fixture
def texts(tmp_path):
    """A corpus of small letters and one of digits, so that a row says which it is of."""
    (tmp_path / "letters.txt").write_text("\f".join("abcdefghij" * 20 for _ in range(20)))
    (tmp_path / "digits.txt").write_text("\f".join("0123456789" * 20 for _ in range(5)))
    return tmp_path / "letters.txt", tmp_path / "digits.txt"


def losses(folder):
    return [line.split('"loss"')[1].split(",")[0] for line in (folder / "journal.jsonl").open() if '"loss"' in line]


def test_a_mixture_is_trained_recorded_gone_on_with_and_told(tmp_path, texts, run):  # noqa: F811
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    begin = ("train", "--data", *texts, "--weights", 3, 1, *OPTIONS, "num_steps=4")
    run(*begin, "--out", straight)
    run(*begin, "--out", parts)
    for path in parts.glob("step-000000004"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    run("train", "--resume", "--out", parts)
    assert losses(parts) == losses(straight) and len(losses(parts)) == 4
    assert checkpoint.load(parts).state["origin"]["weights"] == [3.0, 1.0]
    out, _ = run("info", parts)
    told = " ".join(out.split())
    assert "letters.txt (weight 3)" in told and "digits.txt (weight 1)" in told
    settings, source = prepare.resumed(parts)
    text = prepare.prepare_mixed(source, parts)
    drawn = text.training(settings.network.length, seed=settings.seed).batch(0, 0, 1024, 1024).tokens.numpy()
    digits = np.isin(drawn, list(b"0123456789")).any(1)
    assert 255 <= digits.sum() <= 257  # a quarter, though there is four times less of it
    held = prepare.held_out(parts)
    assert {each[0] for each in held} == {"a", "0"}


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((1,), "one weight for each corpus, got 1 for 2"),
        ((1, 0), "weights must be positive"),
        ((1, -2), "weights must be positive"),
        ((1, "nan"), "weights must be positive"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, texts, run, weights, told):  # noqa: F811
    _, err = run("train", "--data", *texts, "--weights", *weights, "--out", tmp_path / "run", code=2)
    assert told in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_weights_of_a_single_text_are_refused(tmp_path, texts, run):  # noqa: F811
    _, err = run("train", "--data", texts[0], "--weights", 1, "--out", tmp_path / "run", code=2)
    assert "--weights are of several texts" in err


def test_an_empty_text_of_a_mixture_is_named(tmp_path, texts, run):  # noqa: F811
    (tmp_path / "empty.txt").write_text("")
    _, err = run("train", "--data", texts[0], tmp_path / "empty.txt", *OPTIONS, "--out", tmp_path / "run", code=3)
    assert "empty.txt" in err and len(err.strip().splitlines()) == 1


def test_text_of_a_mixture_that_changed_is_refused(tmp_path, texts, run):  # noqa: F811
    mixed = Mixed(sources=tuple(Source(data=str(text)) for text in texts), weights=(1.0, 1.0))
    prepare.prepare_mixed(mixed, tmp_path / "run", vocab_size=258)
    texts[1].write_text("other")
    with pytest.raises(ValueError, match=r"changed since it was tokenized into .*data-1: remove it"):
        prepare.prepare_mixed(mixed, tmp_path / "run", vocab_size=258)


def test_tokens_of_several_texts_are_made_once_and_a_damaged_shard_is_named(tmp_path, texts, run):  # noqa: F811
    _, out = run("tokenize", *texts, "--vocab-size", 258, "--out", tmp_path / "run")
    assert "5,025 tokens of 25 documents" in out
    shard = tmp_path / "run" / "data-1" / "tokens-00000.bin"
    made = shard.stat().st_mtime_ns
    run("train", "--data", *texts, *OPTIONS[2:], "num_steps=1", "--out", tmp_path / "run")
    assert shard.stat().st_mtime_ns == made
    _, out = run("verify", shard.parent)
    assert "is whole: 1,005 tokens of 5 documents" in out
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(content)
    _, err = run("verify", shard.parent, code=3)
    assert f"{shard} is damaged: expected sha256" in err and len(err.strip().splitlines()) == 1
    shard.unlink()
    _, err = run("train", "--resume", "--out", tmp_path / "run", code=3)
    assert f"{shard} is missing" in err and len(err.strip().splitlines()) == 1


def test_a_mixture_that_is_started_again_must_have_the_same_weights(tmp_path, texts, run):  # noqa: F811
    begin = ("train", "--auto-resume", "--data", *texts, *OPTIONS, "num_steps=2", "--out", tmp_path / "run")
    run(*begin, "--weights", 3, 1)
    run(*begin, "--weights", 3, 1)
    _, err = run(*begin, "--weights", 1, 1, code=2)
    assert "has weights = [3.0, 1.0], the options say [1.0, 1.0]" in err
