"""Prompts and answers from the first file to the last token: tokenized, learned from, asked."""

import json
from pathlib import Path

import pytest

from esolm import cli, corpus
from esolm.shards import TokenData

SMALL = ("network.width=32", "network.layers=1", "network.heads=2", "network.length=16", "batch_size=16")
PAIRS = ("--pairs", "--field", "question", "--answer", "reply", "--vocab-size", 258)
ANSWERS = {"up?": "down", "in?": "out", "on?": "off", "hot?": "cold"}


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "qa.jsonl"
    rows = [{"question": question, "reply": reply} for question, reply in ANSWERS.items()] * 10
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(command: str, *arguments: object) -> None:
    cli.main([command, *map(str, arguments)])


def test_pairs_are_tokenized_once_and_trained_on_from_there(questions, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    run("tokenize", questions, "--out", out, *PAIRS)
    assert "40 pairs in" in capsys.readouterr().err
    data = TokenData.open(out / "data")
    assert data.paired and bytes(data.document(0)[:-1].tolist()) == b"up?down"
    monkeypatch.setattr(corpus, "_records", lambda *_: pytest.fail("read again"))
    run("train", "--data", questions, "--out", out, *PAIRS, "--set", *SMALL, "num_steps=2")
    assert (out / "step-000000002").is_dir()


def test_a_model_that_is_fine_tuned_on_pairs_answers_a_prompt_and_ends_there(questions, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\f".join(f"{n}. up and down, in and out, hot or cold" for n in range(40)))
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    run("train", "--data", tmp_path / "text.txt", "--vocab-size", 258, "--out", base, "--set", *SMALL, "num_steps=5")
    settings = (
        "num_steps=400",
        "batch_size=16",
        "optim.schedule.peak=1e-2",
        "optim.average=null",
        "network.dropout=0.0",
    )
    run("train", "--from", base, "--data", questions, *PAIRS, "--out", tuned, "--set", *settings)
    for question, reply in ANSWERS.items():
        capsys.readouterr()
        run("sample", tuned, "--prompt", question, "--temperature", 0, "--dtype", "float32")
        assert capsys.readouterr().out == f"{question}{reply}\n"
