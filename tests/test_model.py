"""A model in its users' hands: texts in, texts out, the same for the same seed; scores that padding does not change."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import esolm
from esolm import checkpoint, likelihood
from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM, Request
from esolm.denoiser import Config, Denoiser
from esolm.model import Model, load
from esolm.noise import generator
from esolm.optim import Config as Optim
from esolm.tokenizer import Tokenizer
from esolm.train import Run, description

BYTES = Tokenizer.bytes()
NETWORK = Config(vocab_size=258, length=32, width=32, layers=1, heads=2)
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM(variant="B")]


def model_of(algorithm: Algorithm) -> Model:
    return Model(Denoiser(NETWORK, torch.Generator().manual_seed(0)), algorithm, BYTES, dtype="float32")


def saved(folder: Path, algorithm: Algorithm) -> Path:
    run = Run(algorithm=algorithm, network=NETWORK, num_steps=10, batch_size=4, optim=Optim())
    network = Denoiser(NETWORK, torch.Generator().manual_seed(0))
    whole = checkpoint.Checkpoint(
        step=7,
        model={name: p + 1 for name, p in network.named_parameters()},
        ema=dict(network.named_parameters()),
        config=description(run),
        tokenizer_json=BYTES.to_json(),
        state={"seconds": 60.0},
    )
    return checkpoint.save(folder, whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path, algorithm):
    saved(tmp_path, algorithm)
    loaded = esolm.load(tmp_path)
    ours = model_of(algorithm)
    assert loaded.algorithm == algorithm
    for name, parameter in ours.denoiser.named_parameters():
        assert torch.equal(parameter, dict(loaded.denoiser.named_parameters())[name])
    raw = load(tmp_path, average=False)
    assert torch.equal(raw.denoiser.embed.weight, ours.denoiser.embed.weight + 1)
    assert load(tmp_path, dtype="float32").sample(seed=3) == ours.sample(seed=3)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_samples_begin_with_their_prompt_and_do_not_depend_on_how_many_there_are(algorithm):
    model = model_of(algorithm)
    three = model.sample(3, prompt="ROMEO:", seed=1, length=24)
    assert all(text.startswith("ROMEO:") for text in three)
    assert model.sample(1, prompt="ROMEO:", seed=1, length=24) == three[:1]
    assert len(set(three)) == 3


@pytest.mark.parametrize("algorithm", [MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM()], ids=repr)
def test_gaps_are_filled_and_the_rest_stands(algorithm):
    text = "ab____cd____efgh" if isinstance(algorithm, BD3LM) else "To be, or ____, that"
    filled = model_of(algorithm).infill(text, seed=2)
    first, _, last = text.partition("____")[0].rstrip(), 0, text.rpartition("____")[2]
    assert filled.startswith(first) and filled.endswith(last) and "____" not in filled
    assert len(BYTES.encode(text)) - ("or ____" in text) >= 16


def test_the_width_of_a_gap_is_its_underscores_or_what_is_asked():
    model = model_of(EsoLM())
    assert model.gaps("a___b").free.tolist() == [1, 2, 3]
    assert model.gaps("a___b__", tokens=5).free.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert model.gaps("a ___b").given == {0: ord("a"), 4: ord("b")}


@pytest.mark.parametrize("algorithm", [MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM()], ids=repr)
@pytest.mark.parametrize("text", ["__", "____ be", "to ___", "__a__", "é__ß____ü—", "a_b __ c_d", "x\n__\ny"])
def test_blanks_may_stand_anywhere_in_a_text_of_any_length(algorithm, text):
    """BD3-LM refused a text with blanks whose tokens do not fill its blocks, which no user can see or mend."""
    model = model_of(algorithm)
    request = model.gaps(text)
    assert request.length == len(text.replace(" __", "__").encode())
    (written,) = model.complete([request])
    assert len(written.tokens) == request.length
    assert all(written.tokens[place] == token for place, token in request.given.items())
    first, last = text.replace(" __", "__").split("__")[0], text.rpartition("__")[2]
    filled = model.infill(text)
    assert filled.startswith(first) and filled.endswith(last)


def test_a_text_with_blanks_is_filled_as_written_alone_or_in_company():
    model = model_of(BD3LM(block_size=4))
    requests = [replace(model.gaps(text), seed=3) for text in ("a____b__", "__ of all", "abcdefg____h")]
    together = model.complete(requests)
    for request, written in zip(requests, together, strict=True):
        assert written.tokens.tolist() == model.complete([request])[0].tokens.tolist()


def test_a_text_that_ends_inside_a_block_shows_no_mask_behind_its_end():
    """The mask rows of a text of six tokens in blocks of four: four, then two, as its padded view has them."""
    model = model_of(BD3LM(block_size=4))
    plan = model.algorithm.plan(Request(length=6, num_steps=1), generator(0))
    assert plan.shown.tolist() == [4, 6] and plan.stop.tolist() == [4, 6]


def test_an_autoregressive_model_fills_a_blank_at_the_end_only():
    model = model_of(AR())
    assert model.infill("so ____").startswith("so")
    for text in ("__ so", "so __ it", "a __ b __"):
        with pytest.raises(ValueError, match="AR takes a prefix only"):
            model.infill(text)
    with pytest.raises(ValueError, match="AR takes a prefix only"):
        model.sample(suffix="end")


def test_a_length_that_is_asked_for_fills_whole_blocks():
    with pytest.raises(ValueError, match=r"length 6 is not divisible by block_size 4.* use a length of 4"):
        model_of(BD3LM(block_size=4)).sample(length=6)


@pytest.mark.parametrize("prompt", ["x" * 32, "é" * 16])
def test_a_prompt_that_fills_the_text_is_the_text(prompt):
    assert model_of(EsoLM()).sample(2, prompt=prompt) == [prompt, prompt]


def test_an_exact_score_takes_one_pass_and_a_bound_as_many_as_asked(monkeypatch):
    rows = []
    nelbo = likelihood.nelbo

    def counted(denoiser, algorithm, batch, noise):
        rows.append(len(batch.tokens))
        return nelbo(denoiser, algorithm, batch, noise)

    monkeypatch.setattr(likelihood, "nelbo", counted)
    model_of(AR()).score("text", samples=7)
    model_of(MDLM()).score("text", samples=7)
    assert rows == [1, 7]


@pytest.mark.parametrize("algorithm", [MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM()], ids=repr)
def test_the_error_of_a_score_is_how_much_scores_differ_or_less(algorithm):
    """Draws of one text share its range of times, so their mean differs less than that of independent ones."""
    model = model_of(algorithm)
    scores = [model.score("some text", samples=8, seed=seed) for seed in range(60)]
    spread = float(np.std([score.nats for score in scores]))
    error = float(np.sqrt(np.mean([score.standard_error**2 for score in scores])))
    assert 0.3 * error < spread < 1.3 * error


def test_a_suffix_stands_at_the_end():
    (text,) = model_of(EsoLM()).sample(prompt="A", suffix="Z.", length=12)
    assert text[0] == "A" and text.endswith("Z.")


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_scores_are_positive_and_repeat(algorithm):
    model = model_of(algorithm)
    first, second = (model.score("some text", samples=8) for _ in range(2))
    assert first == second
    assert first.num_tokens == first.num_bytes == 9
    assert first.nats_per_token > 3
    assert (first.kind == "exact") == (algorithm == AR())


def test_an_exact_score_is_the_sum_over_windows_and_has_no_error():
    model = model_of(AR())
    text = "x" * 40
    score = model.score(text)
    assert score.standard_error == 0.0
    assert score.nats == pytest.approx(model.score(text[:32]).nats + model.score(text[32:]).nats, rel=1e-6)


def test_info_tells_what_it_is_and_how_it_was_trained(tmp_path):
    saved(tmp_path, EsoLM(alpha_0=0.125))
    told = esolm.load(tmp_path).info()
    assert "alpha_0=0.125" in told["method"]
    assert told["trained"].startswith("7 of 10 steps of 4 texts")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.sample(prompt="x" * 40), "the prompt has 40 tokens"),
        (lambda m: m.sample(prompt="long prompt", length=5), "raise length"),
        (lambda m: m.sample(length=33), "longer than the model's 32"),
        (lambda m: m.sample(length=-3), "length must be at least 1, got -3"),
        (lambda m: m.sample(0), "num must be at least 1"),
        (lambda m: m.infill("no gap here"), "no blank in"),
        (lambda m: m.infill("_" * 40), "the model holds 32"),
        (lambda m: m.score(""), "no text to score"),
        (lambda m: m.sample(alpha_0=-0.1), "alpha_0 must lie in"),
        (lambda m: m.infill("a __", prompt="b", length=8), "takes no length or prompt"),
        (lambda m: m.infill("a __", tokens=0), "tokens must be at least 1"),
        (lambda m: m.score("a", samples=0), "samples must be at least 1"),
        (lambda m: m.score("\ud800"), "half a surrogate pair"),
    ],
)
def test_what_the_model_cannot_do_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call(model_of(EsoLM()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_writes_and_scores_the_same(copied):
    """One with a compiled engine could not be copied, and a tokenizer's copy read "<|mask|>" in a text as a mask."""
    model = Model(Denoiser(NETWORK, torch.Generator().manual_seed(0)), EsoLM(), BYTES, facts={"step": 3})
    model.sample(length=8)
    again = copied(model)
    assert again.sample(2, seed=4, prompt="<|mask|>") == model.sample(2, seed=4, prompt="<|mask|>")
    assert again.score("abc") == model.score("abc") and again.facts == model.facts
    assert again.denoiser.embed.weight.data_ptr() != model.denoiser.embed.weight.data_ptr()


OF_OTHER_TYPES = """
import numpy as np
import torch
from esolm.algorithms import EsoLM, Request
from esolm.attention import Relation
from esolm.denoiser import Config, Denoiser
from esolm.draw import Draw
from esolm.model import Model
from esolm.tokenizer import Tokenizer

network, rows = Denoiser(Config(vocab_size=258, length=32, width=32, layers=1, heads=2)), torch.zeros(1, 2).long()
model = Model(network, EsoLM(), Tokenizer.bytes())

def refused(call, *words):
    try:
        call()
    except (ValueError, TypeError) as problem:
        assert all(word in str(problem) for word in words), problem
        return
    raise AssertionError(f"not refused: {words}")

refused(lambda: model.sample(length=8.0), "length must be a whole number, got 8.0")
refused(lambda: model.sample(2.0), "num must be a whole number")
refused(lambda: model.sample(seed=1.0), "seed must be a whole number")
refused(lambda: model.sample(prompt=5), "a text must be a str, got int")
refused(lambda: model.sample(prompt=[1, 2]), "a text must be a str, got list")
refused(lambda: model.score(b"a"), "a text must be a str, got bytes")
refused(lambda: model.infill("a __", tokens=3.0), "tokens must be a whole number")
refused(lambda: model.score("a", samples=2.0), "samples must be a whole number")
refused(lambda: Draw(top_k=5.0), "top_k must be a whole number, got 5.0")
refused(lambda: Request(length=8, num_steps=4.0), "num_steps must be a whole number, got 4.0")
refused(lambda: Request(length=8, given={0.5: 1}), "a given position must be a whole number, got 0.5")
refused(lambda: Request(length=8, given={0: 1.5}), "a given token must be a whole number, got 1.5")
refused(lambda: Model(network, EsoLM(), Tokenizer.bytes(), dtype="fp16"), "auto, float32", "did you mean 'float16'")
refused(lambda: Model(network, EsoLM(), Tokenizer.bytes(), dtype=torch.float16), "got 'torch.float16'")
if type(model.writer).__name__ == "Engine":  # it is handed addresses
    refused(lambda: model.writer(rows, rows.double(), Relation()), "positions must be int64")
    refused(lambda: model.writer(rows.int(), rows, Relation()), "ids must be int64")

given = {torch.tensor(0): np.int16(3), np.int64(2): torch.tensor(5)}
request = Request(length=np.int32(8), given=given, num_steps=torch.tensor(4), seed=np.uint32(7))
assert request == Request(length=8, given={0: 3, 2: 5}, num_steps=4, seed=7)
given[np.int64(1)] = 4
assert request.given == {0: 3, 2: 5}, "a request does not follow its maker"
assert model.sample(seed=np.uint32(5000), length=8) == model.sample(seed=5000, length=8), "32 bits overflow"
"""


def test_numbers_of_other_types_are_whole_or_refused_and_never_read_as_they_lie():
    """A length of 8.0 made positions of float64, which the engine read as int64: the process ended. In a process of
    its own, since the checks of types that tests have would refuse them first."""
    subprocess.run([sys.executable, "-c", OF_OTHER_TYPES], check=True)


def test_a_tokenizer_of_another_model_is_refused():
    network = Denoiser(replace(NETWORK, vocab_size=300))
    with pytest.raises(ValueError, match="the tokenizer has 258 ids and the network 300"):
        Model(network, AR(), BYTES)


def test_importing_the_package_loads_no_torch():
    code = "import sys, esolm, esolm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
