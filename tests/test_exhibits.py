"""What the report shows: strings of tokens, curves of a journal, and pictures that agree with the rule."""

import torch

from esolm import exhibits, recipes
from esolm.algorithms import Request
from esolm.denoiser import Config, Denoiser
from esolm.model import Model
from esolm.sample import Reveal
from esolm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def model() -> Model:
    config = Config(vocab_size=BYTES.vocab_size, length=16, width=16, layers=1, heads=2)
    return Model(Denoiser(config, torch.Generator().manual_seed(0)), recipes.method("esolm-b"), BYTES, dtype="float32")


def test_a_replay_ends_at_the_first_end_of_text_that_was_written():
    end = BYTES.end_id
    reveals = [Reveal(text=0, step=0, phase="diffusion", positions=(5, 3), tokens=(98, end))]
    reveals += [Reveal(text=0, step=1, phase="sequential", positions=(2,), tokens=(97,))]
    request = Request(length=8, given={0: end, 1: 65})
    replay = exhibits.replay(model(), "", "", request, reveals)
    assert replay.end == 3 and "".join(replay.pieces[: replay.end]).endswith("Aa") and replay.pieces[5] == "b"
    assert [(step.phase, step.positions) for step in replay.steps] == [("diffusion", (5, 3)), ("sequential", (2,))]


def test_a_replay_of_gaps_has_no_end():
    reveals = [Reveal(text=0, step=0, phase="sequential", positions=(1,), tokens=(BYTES.end_id,))]
    request = Request(length=3, given={0: 65, 2: 66}, stop_at_end=False)
    assert exhibits.replay(model(), "", "", request, reveals).end == 3


def test_curves_are_training_and_validation_with_its_error():
    entries = [
        {"step": 10, "loss": 5.0, "rate": 0.1},
        {"step": 20, "loss": 4.0},
        {"step": 20, "validation": 4.5, "validation_error": 0.1},
        {"step": 20, "name": "warning", "text": "words"},
    ]
    training, validation = exhibits.curves(entries)
    assert training.points == ((10.0, 5.0), (20.0, 4.0))
    assert validation.points == ((20.0, 4.5, 0.1),)
    assert list(exhibits.curves([])) == []


def test_every_method_has_its_pictures():
    names = [picture.name for picture in exhibits.pictures()]
    pairs = [f"Eso-LM ({kind}), {term}" for kind in "AB" for term in ("diffusion", "sequential")]
    assert names == ["AR", "MDLM", "BD3-LM", *pairs]
    assert all(picture.caption.endswith(".") for picture in exhibits.pictures())


def test_rows_of_the_pictures_are_told_apart():
    """A row that holds a token is named for it, one that holds a mask for what it is to become; and nothing that is
    still to be written is read under its own name."""
    for picture in exhibits.pictures():
        rows = list(zip(picture.labels, picture.masks, strict=True))
        assert len(set(rows)) == len(rows) or picture.name == "BD3-LM"  # there clean tokens stand in both halves
        assert {True, False} == set(picture.masks)
        for (label, masked), row in zip(rows, picture.rows, strict=True):
            read = {rows[at] for at, mark in enumerate(row) if mark == "#"}
            assert (label, masked) in read, "a row reads itself"
            assert not masked or (label, False) not in read, "a mask never reads the token that it is to become"


def test_a_row_of_ar_holds_the_token_before_the_one_that_it_predicts():
    ar, *_ = exhibits.pictures()
    assert "".join(ar.labels) == "aabcdefg" and ar.masks == (True, *[False] * 7)
