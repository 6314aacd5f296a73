"""Texts for terminals and files: JSON lines as they are finished, and nothing lost to Ctrl-C or to an older file."""

import io
import json

import pytest
import torch
from rich.console import Console

from esolm import recipes, texts
from esolm.denoiser import Config, Denoiser
from esolm.model import Model
from esolm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = Tokenizer.bytes()
    config = Config(vocab_size=tokenizer.vocab_size, length=12, width=16, layers=1, heads=2)
    denoiser = Denoiser(config, torch.Generator().manual_seed(0))
    return Model(denoiser, recipes.method("esolm-b"), tokenizer, dtype="float32")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def requests(model: Model, num: int):
    return texts.requests_of(model.request(prompt="To"), num, seed=3)


def interrupted_after(model: Model, monkeypatch, calls: int) -> None:
    """Ctrl-C while the texts of call number `calls` + 1 are being written."""
    complete, seen = model.complete, []

    def completed(part):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(part)
        return complete(part)

    monkeypatch.setattr(model, "complete", completed)


def refuses_to_write(model: Model, monkeypatch) -> None:
    def completed(part):
        pytest.fail("the model wrote")

    monkeypatch.setattr(model, "complete", completed)


def test_texts_are_those_of_the_model(model, console, tmp_path):
    texts.as_json(model, requests(model, 3), tmp_path / "texts.jsonl", console=console)
    records = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["text"] for record in records] == model.sample(3, seed=3, prompt="To")
    for record in records:
        assert model.tokenizer.decode(record["tokens"]) == record["text"] and record["nfe"] >= 1
    assert len({record["seed"] for record in records}) == 3


def test_json_lines_go_to_standard_output_and_nothing_else_does(model, console, capsys):
    texts.as_json(model, requests(model, 2), None, console=console)
    out = capsys.readouterr().out
    assert [json.loads(line)["text"] for line in out.splitlines()] == model.sample(2, seed=3, prompt="To")


def test_finished_texts_are_kept_when_the_others_are_interrupted(model, console, tmp_path, monkeypatch):
    interrupted_after(model, monkeypatch, calls=1)
    with pytest.raises(KeyboardInterrupt):
        texts.as_json(model, requests(model, 20), tmp_path / "texts.jsonl", console=console)
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16 and all(json.loads(line)["text"].startswith("To") for line in lines)
    assert f"16 of 20 texts are finished and kept in {tmp_path / 'texts.jsonl'}" in console.file.getvalue()


@pytest.mark.parametrize("place", ["", "missing/texts.jsonl", "file/texts.jsonl"])
def test_a_file_that_cannot_be_written_is_refused_before_the_model_writes(model, console, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    refuses_to_write(model, monkeypatch)
    with pytest.raises(ValueError, match="cannot write to"):
        texts.as_json(model, requests(model, 1), tmp_path / place, console=console)


def test_a_file_that_holds_something_is_not_overwritten(model, console, tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("precious\n")
    refuses_to_write(model, monkeypatch)
    with pytest.raises(ValueError, match="exists already"):
        texts.as_json(model, requests(model, 1), tmp_path / "texts.jsonl", console=console)
    assert (tmp_path / "texts.jsonl").read_text() == "precious\n"


def test_texts_are_shown_one_after_the_other(model):
    console = Console(file=io.StringIO(), width=40)
    texts.show(model, requests(model, 2), live=True, console=console)
    first, second = model.sample(2, seed=3, prompt="To")
    shown = console.file.getvalue()
    assert shown.startswith(first + "\n") and shown.endswith(second + "\n")


def test_ctrl_c_leaves_what_is_written_of_the_text_being_shown(model, monkeypatch):
    console = Console(file=io.StringIO(), width=40)
    write = model.write

    def stopped(requests):
        for step, reveal in enumerate(write(requests)):
            if step == 4:
                raise KeyboardInterrupt
            yield reveal

    monkeypatch.setattr(model, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        texts.show(model, requests(model, 1), live=True, console=console)
    assert console.file.getvalue().startswith("To") and "░░" in console.file.getvalue()


def test_at_least_one_text_must_be_asked_for(model):
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        requests(model, 0)
