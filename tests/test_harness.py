"""The lm-evaluation-harness asks and our models answer: by hand, task by task, and from its command line."""

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import esolm
from esolm import checkpoint, conditional, plain
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.conditional import Measure
from esolm.evaluate import evaluate
from esolm.likelihood import log_likelihood
from esolm.noise import Noise
from esolm.shipped import MODELS
from esolm.tokenizer import Tokenizer
from slow import network
from test_structure import SOURCE

pytest.importorskip("lm_eval", reason='HARNESS TESTS SKIPPED: pip install "esolm[lm-eval]"')

import lm_eval
from lm_eval.tasks import TaskManager

from esolm import harness

LENGTH = 24
METHODS = {
    "AR": AR(),
    "MDLM": MDLM(),
    "BD3LM": BD3LM(block_size=4),
    "A": EsoLM(variant="A", alpha_0=0.5),
    "B": EsoLM(variant="B", alpha_0=0.5),
}
TASKS = Path(__file__).resolve().parent / "harness"
PAIRS = [("To be,", " or not"), ("To be,", " but"), ("", "To"), ("O ", "Romeo"), ("Fie", "!")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each method, untrained, with weights so large that what is read changes what is said."""
    place, tokenizer = tmp_path_factory.mktemp("runs"), Tokenizer.bytes()
    found = {}
    for name, method in METHODS.items():
        denoiser = network(vocab_size=258, length=LENGTH, width=16)
        saved = checkpoint.Checkpoint(
            step=1,
            model=dict(denoiser.state_dict()),
            config={"network": plain.to_plain(denoiser.config), "algorithm": plain.to_plain(method)},
            tokenizer_json=tokenizer.to_json(),
            state={},
        )
        found[name] = checkpoint.save(place / name, saved)
    return found


def asked(*texts) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in texts]


def model_of(path, **options) -> harness.Harness:
    return harness.Harness(pretrained=str(path), device="cpu", **options)


def exactly(model: esolm.Model, context: str, continuation: str) -> float:
    """log p of AR as the difference of two whole texts, each scored without a prompt."""
    both = [model.tokenizer.encode(text) for text in (context + continuation, context)]
    found = []
    for ids in both:
        batch = Batch.of(torch.tensor([ids], dtype=torch.int64))
        noise = Noise(seed=0, step=0, start=0, stop=1, total=1)
        found.append(float(log_likelihood(model.denoiser, model.algorithm, batch, noise)[0]) if ids else 0.0)
    return found[0] - found[1]


def test_autoregression_gives_the_difference_of_two_texts(runs):
    model = esolm.load(runs["AR"], dtype="float32")
    found = model_of(runs["AR"]).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    pairs = [*PAIRS[:3], ("O", " Romeo"), PAIRS[4]]  # a space goes to the continuation
    for (nats, _), texts in zip(found, pairs, strict=True):
        assert nats == pytest.approx(exactly(model, *texts), abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_answer_does_not_depend_on_what_else_is_asked(runs, name):
    together = model_of(runs[name], orders=4).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    alone = model_of(runs[name], orders=4, batch_size=1)
    for pair, (nats, greedy) in zip(PAIRS, together, strict=True):
        assert alone.loglikelihood(asked(pair), disable_tqdm=True) == [(pytest.approx(nats, abs=1e-4), greedy)]


@pytest.mark.parametrize("name", METHODS)
def test_pairs_are_those_of_the_harness_and_numbers_those_of_the_package(runs, name):
    model, ours = esolm.load(runs[name], dtype="float32"), model_of(runs[name], orders=8, seed=3)
    pairs = [
        conditional.Pair(given=list(context.encode()), scored=list(text.encode()))
        for context, text in [*PAIRS[:3], ("O", " Romeo"), PAIRS[4]]
    ]
    expected = conditional.log_likelihoods(model.denoiser, model.algorithm, pairs, Measure(orders=8, seed=3))
    found = ours.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx(list(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["AR", "MDLM", "B"])
def test_a_context_that_is_too_long_is_cut_from_the_left_and_that_is_said(runs, name):
    model = model_of(runs[name], orders=2)
    with pytest.warns(UserWarning, match="1 of 1 contexts were cut from the left to fit: the model holds 24 tokens"):
        cut = model.loglikelihood(asked(("a" * 40 + "b" * 20, "yes!")), disable_tqdm=True)
    assert cut == [(pytest.approx(model.loglikelihood(asked(("b" * 20, "yes!")))[0][0], abs=1e-4), False)]


def test_a_continuation_that_is_longer_than_the_model_is_scored_whole(runs):
    model = model_of(runs["AR"])
    text = "So shaken as we are, so wan with care, find we a time."
    with pytest.warns(UserWarning, match="cut from the left"):
        ((nats, _),) = model.loglikelihood(asked(("Henry: ", text)), disable_tqdm=True)
    ids = list(f"Henry: {text}".encode())
    start, total = 6, 0.0  # the space goes to the continuation
    while start < len(ids):
        stop = min(start - min(12, start) + LENGTH, len(ids))
        first = max(0, stop - LENGTH)
        total += exactly(esolm.load(runs["AR"]), bytes(ids[first:start]).decode(), bytes(ids[start:stop]).decode())
        start = stop
    assert nats == pytest.approx(total, abs=1e-3)


def test_what_merges_with_the_last_token_of_its_context_is_scored_all_the_same(tmp_path):
    """The pair's one token leaves the continuation none: it is then cut apart, not scored as nothing."""
    tokenizer = Tokenizer.train(["to be " * 50], 262)
    assert len(tokenizer.encode("to")) == 1
    denoiser = network(vocab_size=tokenizer.vocab_size, length=8, width=16)
    saved = checkpoint.Checkpoint(
        step=1,
        model=dict(denoiser.state_dict()),
        config={"network": plain.to_plain(denoiser.config), "algorithm": plain.to_plain(AR())},
        tokenizer_json=tokenizer.to_json(),
        state={},
    )
    model = model_of(checkpoint.save(tmp_path / "run", saved))
    ((nats, _),) = model.loglikelihood(asked(("t", "o")), disable_tqdm=True)
    pair = conditional.Pair(given=tokenizer.encode("t"), scored=tokenizer.encode("o"))
    assert nats == pytest.approx(next(conditional.log_likelihoods(denoiser, AR(), [pair], Measure())), abs=1e-4)
    assert nats < 0


@pytest.mark.parametrize("name", METHODS)
def test_a_document_is_scored_as_esolm_evaluate_scores_it(runs, name):
    """One of a window, but for its end-of-text, which the harness does not score; and long ones window by window."""
    ours = model_of(runs[name], orders=4, samples=4)
    text = "To be, or not to be: that is the question: whether 'tis nobler"
    whole = text[: 2 * LENGTH]
    (nats,) = ours.loglikelihood_rolling(asked((whole,)), disable_tqdm=True)
    halves = ours.loglikelihood_rolling(asked((whole[:LENGTH],), (whole[LENGTH:],)), disable_tqdm=True)
    assert nats == pytest.approx(sum(halves), abs=1e-3)
    model = esolm.load(runs[name], dtype="float32")
    if name == "AR":
        model.tokenizer.end_id = None  # `evaluate` scores it too, where there is one
        (row,) = evaluate(model, [whole])
        assert row.estimate.nats_per_token * row.estimate.num_tokens == pytest.approx(-nats, abs=1e-3)
    read = model_of(runs[name], orders=4, samples=4, context=LENGTH - 1)
    (closer,) = read.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert closer != pytest.approx(ours.loglikelihood_rolling(asked((text,)))[0], abs=1e-3)
    assert ours.loglikelihood_rolling(asked(("",)), disable_tqdm=True) == [0.0]


@pytest.mark.parametrize("name", METHODS)
def test_a_text_does_not_depend_on_its_batch_and_is_cut_where_it_ends(runs, name):
    options = {"until": ["e", "zz"], "max_gen_toks": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    contexts = ["To be", "O Romeo, Romeo", "", "x"]
    requests = asked(*((context, options) for context in contexts))
    together = model_of(runs[name], batch_size=3).generate_until(requests, disable_tqdm=True)
    alone = model_of(runs[name], batch_size=1)
    assert together == [alone.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert all("e" not in text for text in together)
    model = esolm.load(runs[name], dtype="float32")
    for context, text in zip(contexts, together, strict=True):
        length = len(context.encode()) + 6
        request = {"prompt": context, "temperature": 0.9, "top_p": 0.95, "seed": 0}
        if length % model.algorithm.length_multiple == 0:
            (whole,) = model.complete([model.request(length=length, **request)])
            rest = model.tokenizer.decode(whole.tokens[len(context) :].tolist())
            assert text == re.split("e|zz", rest)[0]


def test_the_same_request_again_is_written_again_and_greedily_the_same(runs):
    model, drawn = model_of(runs["B"]), {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "until": []}
    texts = model.generate_until(asked(*[("To be", drawn)] * 4), disable_tqdm=True)
    assert len(set(texts)) == 4
    assert texts == model.generate_until(asked(*[("To be", drawn)] * 4), disable_tqdm=True)
    other = model_of(runs["B"], seed=1).generate_until(asked(*[("To be", drawn)] * 4), disable_tqdm=True)
    assert not set(other) & set(texts)
    greedy = model_of(runs["AR"]).generate_until(asked(*[("To be", {"max_gen_toks": 8})] * 2), disable_tqdm=True)
    assert greedy[0] == greedy[1]
    ((_, same),) = model_of(runs["AR"]).loglikelihood(asked(("To be", greedy[0])), disable_tqdm=True)
    assert same or "\ufffd" in greedy[0]


def test_writing_stops_early_only_where_all_texts_have_ended(runs, monkeypatch):
    """Steps of an autoregressive text that is over are left out."""
    steps = []
    advance = harness.Writer.advance
    monkeypatch.setattr(harness.Writer, "advance", lambda self: (steps.append(1), advance(self))[1])
    model = model_of(runs["AR"])
    options = {"max_gen_toks": 20, "do_sample": True, "until": []}
    (whole,) = model.generate_until(asked(("To", options)), disable_tqdm=True)
    assert len(steps) == 20
    first = next(letter for letter in whole if letter.isprintable() and letter != "\ufffd")
    steps.clear()
    (cut,) = model.generate_until(asked(("To", {**options, "until": [first]})), disable_tqdm=True)
    assert (
        cut == whole.partition(first)[0] and len(steps) in (8, 16, 20) and (whole.index(first) > 6 or len(steps) == 8)
    )


def test_a_prompt_that_is_too_long_is_cut_from_the_left(runs):
    model = model_of(runs["AR"])
    with pytest.warns(UserWarning, match="1 of 1 prompts were cut from the left"):
        (cut,) = model.generate_until(asked(("a" * 30 + "b" * 18, {"max_gen_toks": 6})), disable_tqdm=True)
    assert [cut] == model.generate_until(asked(("b" * 18, {"max_gen_toks": 6})), disable_tqdm=True)
    with pytest.warns(UserWarning, match="1 of 1 texts are shorter than asked for"):
        (short,) = model.generate_until(asked(("b" * 18, {"max_gen_toks": 300})), disable_tqdm=True)
    with pytest.warns(UserWarning, match="no use for the generation options num_beams"):
        model.generate_until(asked(("b", {"num_beams": 4})), disable_tqdm=True)
    assert short


def test_what_the_arguments_say_of_drawing_holds_where_a_task_is_silent():
    def draw(options, **model):
        return harness._asked(options, model, 5).draw

    assert draw({}).temperature == 0 and draw({"do_sample": True}).temperature == 1
    assert draw({}, temperature=0.7).temperature == 0.7 and draw({"do_sample": False}, temperature=0.7).temperature == 0
    assert draw({"temperature": 0.3, "top_p": 0.5}, temperature=0.7, top_p=0.9).top_p == 0.5
    assert draw({"top_k": 0}).top_k is None and draw({"top_k": 7}).top_k == 7
    assert harness._asked({"until": "x", "max_tokens": 3}, {}, 5).until == ("x",)
    assert harness._asked({"max_new_tokens": 3}, {}, 5).num_tokens == 3


def test_alpha_0_of_the_arguments_is_that_of_the_likelihood_too(runs):
    found = model_of(runs["B"], alpha_0=0).loglikelihood(asked(*PAIRS[:3]), disable_tqdm=True)
    model = esolm.load(runs["B"], dtype="float32")
    pairs = [conditional.Pair(given=list(c.encode()), scored=list(t.encode())) for c, t in PAIRS[:3]]
    exact = conditional.log_likelihoods(model.denoiser, EsoLM(variant="B", alpha_0=0.0), pairs, Measure())
    assert [nats for nats, _ in found] == pytest.approx(list(exact), abs=1e-4)
    assert model_of(runs["B"], alpha_0=0).get_model_info()["loglikelihood"] == "exact"


def test_a_measure_is_named(runs):
    told = {name: model_of(runs[name], orders=8, samples=5).get_model_info() for name in METHODS}
    assert told["AR"]["loglikelihood"] == told["AR"]["loglikelihood_rolling"] == "exact"
    assert told["B"]["loglikelihood_rolling"] == "importance-weighted bound of 8 orders"
    assert told["MDLM"]["loglikelihood"] == "importance-weighted bound of 8 orders"
    assert told["MDLM"]["loglikelihood_rolling"] == "NELBO of 5 draws"
    assert model_of(runs["MDLM"], orders=0).get_model_info()["loglikelihood"] == "NELBO of 16 draws"


MISTAKES = [
    ({"orderz": 3}, "there is no model argument 'orderz'; did you mean 'orders'?"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"batch_size": "many"}, "batch_size must be a whole number, got 'many'"),
    ({"samples": 0}, "samples must be at least 1, got 0"),
    ({"orders": 1.5}, "orders must be a whole number, got 1.5"),
    ({"dtype": "float8"}, "dtype is one of auto, float32"),
    ({"temperature": -1}, "temperature must be at least 0"),
    ({"top_p": 2}, "top_p must lie in"),
    ({"alpha_0": 0.5}, "AR takes no alpha_0"),
    ({"num_steps": 4}, "AR takes no num_steps"),
    ({"context": LENGTH}, "context must lie in"),
    ({"device": "nowhere"}, "there is no device 'nowhere'"),
]


@pytest.mark.parametrize(("options", "told"), MISTAKES, ids=lambda value: str(value)[:20])
def test_a_mistake_is_one_line(runs, options, told):
    with pytest.raises(ValueError) as found:
        harness.Harness(**{"pretrained": str(runs["AR"]), "device": "cpu", **options})
    assert told in str(found.value) and "\n" not in str(found.value)


def test_no_model_no_context_template(runs):
    with pytest.raises(ValueError, match="needs pretrained"):
        harness.Harness()
    with pytest.raises(ValueError, match="no chat template"):
        model_of(runs["AR"]).apply_chat_template([])


def test_the_harness_remembers_answers(runs, tmp_path):
    """Its cache of answers, by which a run goes on: asked again, the model is not."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    options = {"model": "esolm", "tasks": ["hebrews_endings"], "limit": 2, "task_manager": manager}
    options |= {"model_args": {"pretrained": str(runs["AR"]), "device": "cpu"}, "use_cache": str(tmp_path / "answers")}
    first = _quietly(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditional, "log_likelihoods", lambda *_, **__: pytest.fail("asked again"))
        again = _quietly(**options)
    assert first["results"] == again["results"]


def _quietly(**options) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lm_eval.simple_evaluate(bootstrap_iters=0, verbosity="ERROR", **options)


@pytest.fixture(scope="module")
def answered() -> dict:
    """The tasks of the folder, as far as a minute goes, by the model that comes along."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    model = harness.Harness(MODELS[0], device="cpu", orders=4)
    found = {}
    limits = {"hebrews_shuffled": 20, "hebrews_last_words": 16, "hebrews_chapters": 1, "hebrews_written_words": 16}
    for task, limit in limits.items():
        found |= _quietly(model=model, tasks=[task], limit=limit, task_manager=manager)["results"]
    return found


def test_the_model_that_comes_along_tells_true_endings_of_verses_from_their_words_shuffled(answered):
    """A quarter would be chance, of a book that it never saw; the answers of a question have the same length."""
    assert answered["hebrews_shuffled"]["acc,none"] >= 0.8


def test_it_finds_a_book_that_it_never_saw_as_likely_as_its_card_says(answered):
    measured = answered["hebrews_chapters"]
    assert 1.2 < measured["bits_per_byte,none"] < 1.75
    assert measured["byte_perplexity,none"] == pytest.approx(2 ** measured["bits_per_byte,none"])
    assert measured["word_perplexity,none"] > 100


def test_last_words_are_scored_and_written(answered):
    assert 1 < answered["hebrews_last_words"]["perplexity,none"] < 2048 * 8
    assert 0 <= answered["hebrews_written_words"]["exact_match,word"] < 0.9
    assert all(math.isfinite(value) for row in answered.values() for value in row.values() if isinstance(value, float))


@pytest.mark.timeout(900)  # the harness reads all its tasks and asks the machine what it is
def test_the_command_line_runs_a_task_with_no_network(runs):
    words = ["--model", "esolm", "--model_args", f"pretrained={runs['B']}", "device=cpu", "orders=2"]
    words += ["--include_path", str(TASKS), "--tasks", "hebrews_written_words", "--limit", "2", "--batch_size", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-m", "esolm.harness", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"\|hebrews_written_words\|.*\|exact_match\|", ended.stdout)


def test_a_harness_that_names_a_gpu_by_default_finds_the_machine_it_is_on(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = {"pretrained": str(runs["B"])}
    found = harness.Harness.create_from_arg_obj(asked, {"device": "cuda:0", "batch_size": 2})
    assert found._device.type == "cpu" and found.batch_size == 2
    with pytest.raises(ValueError, match="no device 'cuda:1'"):
        harness.Harness.create_from_arg_obj(asked, {"device": "cuda:1"})


def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys):
    words = ["--model", "esolm", "--model_args", "pretrained=esolm-shakespeare", "orderz=2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--include_path", str(TASKS), "--tasks", "hebrews_endings"])
    with pytest.raises(SystemExit) as ended:
        harness.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith(
        "esolm: there is no model argument 'orderz'; did you mean 'orders'?"
    )


def test_a_missing_harness_is_one_line(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    ended = subprocess.run(
        [sys.executable, "-m", "esolm.harness", "--tasks", "x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE.parent}"},
        check=False,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert 'pip install "esolm[lm-eval]"' in ended.stderr
