"""One table for all methods: the same bytes for each, exact where it can be, and bounds that say they are bounds."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.denoiser import Config, Denoiser
from esolm.evaluate import evaluate, table
from esolm.likelihood import log_likelihood, nelbo
from esolm.model import Model
from esolm.noise import Noise
from esolm.tokenizer import Tokenizer

LENGTH = 12
DOCUMENTS = ["A short one.", "", "Ünïcödé — cut in the middle of characters: ßßßßßßßß €€€€€", "x" * 30]
BYTES = Tokenizer.bytes()
METHODS = {
    "ar": AR(),
    "mdlm": MDLM(),
    "bd3lm": BD3LM(block_size=4),
    "a": EsoLM(variant="A"),
    "b": EsoLM(variant="B"),
}


def model_of(algorithm, length: int = LENGTH, tokenizer: Tokenizer = BYTES) -> Model:
    network = Config(vocab_size=tokenizer.vocab_size, length=length, width=16, layers=1, heads=2)
    return Model(Denoiser(network, torch.Generator().manual_seed(0)), algorithm, tokenizer, dtype="float32")


def shown(rows) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(rows))
    return console.file.getvalue()


def test_five_models_make_one_table_over_the_same_bytes():
    rows = [
        row
        for name, algorithm in METHODS.items()
        for row in evaluate(model_of(algorithm), DOCUMENTS, name=name, samples=2, orders=2)
    ]
    assert [(row.name, row.estimate.kind) for row in rows] == [
        ("ar", "exact"),
        ("mdlm", "NELBO"),
        ("bd3lm", "NELBO"),
        ("a", "NELBO"),
        ("b", "NELBO"),
        ("b", "importance-weighted bound"),
    ]
    assert {row.num_bytes for row in rows} == {len("".join(DOCUMENTS).encode())}
    assert len({(row.estimate.num_tokens, row.estimate.num_texts) for row in rows}) == 1
    lines = [line for line in shown(rows).splitlines() if "exact" in line or "of 2" in line]
    assert len(lines) == 6
    assert [line.count("≤") for line in lines] == [0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("length", [3, 5, 12])
def test_a_character_cut_between_windows_counts_by_its_bytes(length):
    """Of every window of a text: its tokens are bytes, and a window of odd length cuts an umlaut in two."""
    (row,) = evaluate(model_of(AR(), length), DOCUMENTS)
    assert row.num_bytes == len("".join(DOCUMENTS).encode())
    nats = row.estimate.nats_per_token * row.estimate.num_tokens
    assert row.values()["bits_per_byte"] == pytest.approx(nats / row.num_bytes / math.log(2))
    assert row.estimate.num_tokens == row.num_bytes + 3  # three texts end


def test_bits_a_byte_are_of_the_text_whatever_the_tokenizer():
    bpe = Tokenizer.train(["Ünïcödé € " * 40 + "A short one. x xx xxx xxxx"], 262)
    (row,) = evaluate(model_of(AR(), tokenizer=bpe), DOCUMENTS)
    assert row.num_bytes == len("".join(DOCUMENTS).encode())
    assert row.estimate.num_tokens < row.num_bytes + 3


def test_an_exact_value_is_the_sum_over_windows_of_their_log_likelihoods_unpadded():
    model = model_of(AR())
    (row,) = evaluate(model, DOCUMENTS)
    total = 0.0
    for document in filter(None, DOCUMENTS):
        ids = [*BYTES.encode(document), BYTES.end_id]
        for at in range(0, len(ids), LENGTH):
            alone = Batch.of(torch.tensor([ids[at : at + LENGTH]]))
            noise = Noise(seed=0, step=0, start=0, stop=1, total=1)
            total -= float(log_likelihood(model.denoiser, AR(), alone, noise))
    assert row.estimate.nats_per_token * row.estimate.num_tokens == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS)
def test_how_many_windows_go_together_changes_nothing(algorithm, monkeypatch):
    together = evaluate(model_of(algorithm), DOCUMENTS, samples=3, orders=3, seed=4)
    monkeypatch.setattr("esolm.evaluate._AT_ONCE", 3)
    fewer = evaluate(model_of(algorithm), DOCUMENTS, samples=3, orders=3, seed=4)
    for a, b in zip(together, fewer, strict=True):
        assert a.estimate.nats_per_token == pytest.approx(b.estimate.nats_per_token, abs=1e-5)
        assert replace(a.estimate, nats_per_token=0.0, standard_error=0.0) == replace(
            b.estimate, nats_per_token=0.0, standard_error=0.0
        )


def test_scores_of_a_model_and_its_evaluation_agree():
    """A score leaves out end-of-text and is otherwise the same measure."""
    model, text = model_of(AR()), "A short one"  # eleven bytes and its end make one window
    (row,) = evaluate(model, [text])
    whole = torch.tensor([[*BYTES.encode(text), BYTES.end_id]])
    last = Batch(tokens=whole, given=torch.arange(12)[None] < 11, valid=torch.ones_like(whole).bool())
    end = float(nelbo(model.denoiser, AR(), last, Noise(seed=0, step=0, start=0, stop=1, total=1)))
    assert row.estimate.nats_per_token * 12 == pytest.approx(model.score(text).nats + end, rel=1e-5)


@pytest.mark.parametrize(("texts", "expected"), [(1, 1), (4, 4), (10, 10), (11, 11), (99, 11)])
def test_as_many_windows_are_measured_as_asked_for_if_there_are(texts, expected):
    """Every second of 300 windows was taken where 256 were asked for."""
    (row,) = evaluate(model_of(AR()), ["y" * (LENGTH * 11 - 1)], texts=texts)
    assert row.estimate.num_texts == expected
    assert row.num_bytes in (expected * LENGTH, expected * LENGTH - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"orders": -1, "texts": 0}, "orders must be at least 0, got -1; texts must be at least 1, got 0"),
        ({"documents": []}, "there is no text to score"),
        ({"documents": ["", ""]}, "there is no text to score"),
    ],
)
def test_what_cannot_be_measured_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(model_of(MDLM()), **({"documents": DOCUMENTS} | options))


def test_the_network_that_writes_can_be_scored_and_smaller_weights_cost_a_little():
    network = Denoiser(Config(vocab_size=BYTES.vocab_size, length=LENGTH, width=64, layers=1, heads=2))
    with torch.no_grad():
        network.head.weight.mul_(20)
    for algorithm in METHODS.values():
        found = {}
        for dtype in ("float32", "int8"):
            model = Model(network, algorithm, BYTES, dtype=dtype)
            exact, written = (evaluate(model, DOCUMENTS, as_written=way)[0].estimate for way in (False, True))
            found[dtype] = abs(written.nats_per_token - exact.nats_per_token)
        assert found["float32"] < 1e-5 < found["int8"] < 0.1
