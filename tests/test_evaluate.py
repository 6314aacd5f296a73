"""One table for all methods: the same bytes for each, exact where it can be, and bounds that say they are bounds."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from esolm import likelihood
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.denoiser import Config, Denoiser
from esolm.evaluate import evaluate, markdown, table
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
        for row in evaluate(model_of(algorithm), DOCUMENTS, name=name, samples=2, orders=[2])
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
    together = evaluate(model_of(algorithm), DOCUMENTS, samples=3, orders=[3], seed=4)
    monkeypatch.setattr("esolm.evaluate._AT_ONCE", 3)
    fewer = evaluate(model_of(algorithm), DOCUMENTS, samples=3, orders=[3], seed=4)
    for a, b in zip(together, fewer, strict=True):
        assert a.estimate.nats_per_token == pytest.approx(b.estimate.nats_per_token, abs=1e-5)
        measured = {"nats_per_token": 0.0, "standard_error": 0.0, "monte_carlo_error": None}
        assert replace(a.estimate, **measured) == replace(b.estimate, **measured)
        assert a.estimate.monte_carlo_error == pytest.approx(b.estimate.monte_carlo_error, abs=1e-5)


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
        ({"orders": [-1], "texts": 0}, "texts must be at least 1, got 0; orders must be at least 1, got -1"),
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


@pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("context", [1, 5, 11])
def test_every_token_is_scored_once_whatever_the_context(algorithm, context):
    length = 12
    (row, *_) = evaluate(model_of(algorithm, length), DOCUMENTS, context=context)
    assert row.num_bytes == len("".join(DOCUMENTS).encode())
    assert row.estimate.num_tokens == row.num_bytes + 3


def test_a_context_is_read_and_its_tokens_are_not_scored_again():
    """Windows of 8 after 4 of context: each token's conditional, summed by hand from unpadded prefixes."""
    model, text, context = model_of(AR()), "abcdefghijklmnopqrstuvwxyz", 4
    (row,) = evaluate(model, [text], context=context)
    ids = [*BYTES.encode(text), BYTES.end_id]
    noise, total, at = Noise(seed=0, step=0, start=0, stop=1, total=1), 0.0, 0
    while at < len(ids):
        begin = max(0, at - context)
        stop = min(len(ids), begin + LENGTH)
        whole, read = (torch.tensor([ids[begin:end]]) for end in (stop, at))
        total -= float(log_likelihood(model.denoiser, AR(), Batch.of(whole), noise))
        total += float(log_likelihood(model.denoiser, AR(), Batch.of(read), noise)) if at > begin else 0.0
        at = stop
    assert row.estimate.nats_per_token * row.estimate.num_tokens == pytest.approx(total, rel=1e-6)


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("esolm.evaluate._AT_ONCE", 2)
    model = model_of(EsoLM())
    whole = evaluate(model, DOCUMENTS, samples=2, orders=[2, 3], scores=tmp_path / "whole")
    parts = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(parts) == 2
    (tmp_path / "torn").mkdir()
    for name, kept in parts.items():
        (tmp_path / "torn" / name).write_bytes(kept[: 2 * len(kept) // 3])  # in the middle of a line
    seen = []
    real = likelihood.draws
    monkeypatch.setattr("esolm.likelihood.draws", lambda *a: seen.append(len(a[2].tokens)) or real(*a))
    again = evaluate(model, DOCUMENTS, samples=2, orders=[2, 3], scores=tmp_path / "torn")
    assert again == whole
    assert {path.name: path.read_bytes() for path in (tmp_path / "torn").iterdir()} == parts
    assert 0 < sum(seen) < 2 * whole[0].estimate.num_texts


def test_scores_of_other_settings_are_kept_apart(tmp_path):
    for options in ({}, {"seed": 1}, {"samples": 2}, {"context": 1}, {"as_written": True}):
        evaluate(model_of(EsoLM()), DOCUMENTS, **({"scores": tmp_path} | options))
    assert len(list(tmp_path.iterdir())) == 5
    evaluate(model_of(EsoLM()), DOCUMENTS, scores=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_more_orders_keep_the_draws_of_fewer_and_the_bound_is_no_worse_than_their_mean(tmp_path):
    model = model_of(EsoLM())
    rows = evaluate(model, DOCUMENTS, orders=[1, 10, 40], scores=tmp_path)
    (path,) = (path for path in tmp_path.iterdir() if "importance" in path.read_text().partition("\n")[0])
    lines = path.read_text().splitlines()[1:]
    nats = torch.tensor([json.loads(line)["nats"] for line in lines], dtype=torch.float64)
    tokens = rows[0].estimate.num_tokens
    for row, number in zip(rows[1:], (1, 10, 40), strict=True):
        mean = float(nats[:, :number].mean(1).sum()) / tokens
        assert row.estimate.nats_per_token <= mean + 1e-9
        assert (row.estimate.nats_per_token < mean - 1e-9) == (number > 1)
        assert evaluate(model, DOCUMENTS, orders=[number])[1] == row


def test_the_error_of_the_draws_is_the_spread_over_seeds():
    model = model_of(EsoLM())
    for kind in (0, 1):
        rows = [evaluate(model, DOCUMENTS, samples=8, orders=[8], seed=seed)[kind].estimate for seed in range(40)]
        spread = float(torch.tensor([row.nats_per_token for row in rows]).std())
        told = sum(row.monte_carlo_error for row in rows) / len(rows)
        assert 0.6 < spread / told < 1.6, (kind, spread, told)


def test_an_interval_over_documents_holds_the_mean_and_shrinks_with_more_of_them():
    few = ["a" * 40, "Ünï €€", "b c d e f", "xyzxyz"]
    (row,), (more,) = evaluate(model_of(AR()), few), evaluate(model_of(AR()), few * 16)
    for found in (row, more):
        assert found.interval[0] < found.estimate.nats_per_token < found.interval[1]
    assert more.interval[1] - more.interval[0] < 0.5 * (row.interval[1] - row.interval[0])
    assert evaluate(model_of(AR()), few[:1])[0].interval is None
    (same,) = evaluate(model_of(AR()), ["alike"] * 5)
    assert same.interval[1] - same.interval[0] < 1e-6


def test_each_measure_says_which_conditional_it_uses():
    def told(algorithm):
        return [row.conditional for row in evaluate(model_of(algorithm), DOCUMENTS, samples=1, orders=[1])]

    assert told(AR()) == told(EsoLM(alpha_0=0.0)) == ["sequential"]
    assert told(MDLM()) == told(BD3LM(block_size=4)) == told(EsoLM(variant="A", alpha_0=1.0)) == ["parallel"]
    assert told(EsoLM()) == ["parallel and sequential", "sequential"]


@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_a_score_that_is_not_finite_is_said_and_those_before_it_are_kept(tmp_path, monkeypatch, at_once):
    """Those of its own batch, too: they were lost once."""
    monkeypatch.setattr("esolm.evaluate._AT_ONCE", at_once)
    model = model_of(AR())
    with torch.no_grad():
        model.denoiser.embed.weight[ord("x")] = math.nan
    with pytest.raises(ArithmeticError, match="the score of text 9 is nan"):
        evaluate(model, DOCUMENTS, scores=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert len(kept.read_text().splitlines()) == 10  # the key and nine windows without an x


def test_a_table_in_markdown_has_a_line_for_each_row():
    rows = evaluate(model_of(EsoLM()), DOCUMENTS, orders=[1, 3])
    lines = markdown(rows).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {10}
    assert "importance-weighted bound of 3" in lines[-1]
    assert "nan" not in markdown(evaluate(model_of(EsoLM()), DOCUMENTS[:1], texts=1))  # one window has no error


def test_a_table_in_the_terminal_cuts_no_name_off():
    """Two runs of one long folder had one name."""
    name = "runs/a-long-folder-of-runs/and-a-long-name-0.125"
    console = Console(file=io.StringIO(), width=80)
    console.print(table(evaluate(model_of(EsoLM()), DOCUMENTS, name=name)))
    rows = console.file.getvalue().partition("─ \n")[2].splitlines()
    assert "".join(row.strip().partition("  ")[0] for row in rows) == name
