"""Writing with a cache, in batches: the same logits as from scratch, the same texts in whatever company.

The other side here is `from_scratch`: every row of a step fed anew, for one text, under the rule itself.
"""

import itertools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from esolm import native
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM, Request
from esolm.attention import Relation, attends
from esolm.draw import Draw, draw_rows
from esolm.engine import Engine
from esolm.noise import generator
from esolm.order import Interleaved, Positions
from esolm.sample import Writer, complete, write
from slow import network, unchecked

LENGTH, VOCAB = 16, 12
END = 10
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A", alpha_0=0.5), EsoLM(variant="B", alpha_0=0.5)]
METHODS = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["AR", "MDLM", "BD3LM", "A", "B"])
DENOISER = network(vocab_size=VOCAB, length=LENGTH, width=16)
GROUPED = network(vocab_size=VOCAB, length=LENGTH, width=16, heads=4, kv_heads=2, qk_norm=True, rms_norm=True)


@pytest.fixture(autouse=True)
def quick():
    with unchecked():
        yield


def requests_for(algorithm, count: int = 24) -> list[Request]:
    """Lengths, prompts, islands and options of every kind, mixed."""
    made = []
    for seed in range(count):
        length = (16, 8, 12, 4)[seed % 4]
        islands = ({}, {0: 1, 1: 2, 2: 3}, {length - 1: 4}, {1: 5, 3: 6}, {0: 7, 2: 8, length - 2: 9})[seed % 5]
        prompt = {place: 1 + place for place in range(min(length - 1, seed % 7))}
        options = {"draw": (Draw(), Draw(temperature=0), Draw(top_k=3), Draw(top_p=0.8, temperature=1.3))[seed % 4]}
        if algorithm != AR():
            options["num_steps"] = (None, 1, 2, 3)[seed % 3 + seed % 2]
            options["positions"] = (Interleaved(), Request(length=1).positions)[seed % 5 != 0]
        if isinstance(algorithm, EsoLM):
            options["alpha_0"] = (0.0, 0.25, 0.5, 1.0, None)[seed % 5 - seed % 3]
        given = prompt if algorithm == AR() else islands
        made.append(Request(length=length, given=given, seed=seed, **options))
    return made


@torch.inference_mode()
def from_scratch(denoiser, algorithm, request, step, tokens):
    """Logits of the ranks that a step writes, nothing cached, of a text whose tokens by rank are these."""
    plan = algorithm.plan(request, generator(request.seed, 0))
    shown, start = int(plan.shown[step]), int(plan.start[step])
    rank = np.arange(shown)
    held = np.where(rank < start, tokens[:shown], denoiser.config.mask_id)
    if plan.shifted:
        held = np.concatenate(([denoiser.config.mask_id], tokens[: shown - 1]))
    stage = np.where(rank < start, plan.token_stage[:shown], plan.mask_stage[:shown])
    public = (rank < plan.closed[step]) | plan.masks_public
    rows = [torch.from_numpy(x)[None] for x in (held, plan.order[:shown], stage, public)]
    who = Relation(mask=attends(rows[2], rows[3], rows[2], rows[3])[:, None])
    return denoiser.logits(denoiser(rows[0], rows[1], who))[0, start : plan.stop[step]]


def writing(denoiser, compiled: bool):
    """The denoiser as it is, or compiled."""
    if compiled and native.library() is None:
        pytest.skip("no C compiler is here")
    return Engine(denoiser, "float32") if compiled else denoiser


each_kind = pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])


@torch.inference_mode()
@each_kind
@pytest.mark.parametrize("denoiser", [DENOISER, GROUPED], ids=["plain", "grouped"])
@METHODS
def test_cached_logits_are_those_from_scratch(algorithm, denoiser, compiled):
    network = writing(denoiser, compiled)
    requests = requests_for(algorithm)
    plans = [algorithm.plan(request, generator(request.seed, 0)) for request in requests]
    known = [
        np.array([request.given.get(int(place), VOCAB - 1) for place in plan.order])
        for request, plan in zip(requests, plans, strict=True)
    ]
    writer, rng, compared = Writer(network, algorithm, requests), np.random.default_rng(0), 0
    unfinished = [text for text, plan in enumerate(plans) if plan.num_steps]
    for step in itertools.count():
        if not writer.active:
            break
        hidden, row, rank = writer.evaluate()
        logits = network.logits(hidden)
        tokens = rng.integers(0, VOCAB - 1, len(rank))
        for place, text in enumerate(unfinished):
            expected = from_scratch(denoiser, algorithm, requests[text], step, known[text])
            torch.testing.assert_close(logits[row == place], expected, rtol=0, atol=1e-5)
            known[text][rank[row == place]] = tokens[row == place]
            compared += len(expected)
        writer.accept(row, rank, tokens)
        unfinished = [text for text in unfinished if step + 1 < plans[text].num_steps]
    assert compared == sum(len(request.free) for request in requests)
    for text, written in enumerate(writer.texts()):
        np.testing.assert_array_equal(written.tokens[plans[text].order], known[text])
        assert written.nfe == plans[text].num_steps


@each_kind
@METHODS
def test_a_text_is_the_same_alone_and_in_any_company(algorithm, compiled):
    network, requests = writing(DENOISER, compiled), requests_for(algorithm)
    together = [text.tokens.tolist() for text in complete(network, algorithm, requests)]
    assert together == [complete(network, algorithm, [request])[0].tokens.tolist() for request in requests]
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(len(requests))[: len(requests) - 5 * seed]
        written = complete(network, algorithm, [requests[place] for place in shuffled])
        assert [text.tokens.tolist() for text in written] == [together[place] for place in shuffled]


@METHODS
def test_a_text_ends_where_its_end_is_written(algorithm):
    requests = requests_for(algorithm)
    whole = complete(DENOISER, algorithm, requests)
    ended = complete(DENOISER, algorithm, requests, end_id=END)
    assert any(len(text.tokens) < request.length for text, request in zip(ended, requests, strict=True))
    assert sum(text.nfe for text in ended) < sum(text.nfe for text in whole)
    for request, text, full in zip(requests, ended, whole, strict=True):
        own = full.tokens[request.free[0] :] == END
        cut = int(request.free[0] + own.argmax()) if own.any() else request.length
        np.testing.assert_array_equal(text.tokens, full.tokens[:cut])


@METHODS
def test_a_text_that_is_asked_to_go_on_does_not_end(algorithm):
    requests = [Request(length=LENGTH, seed=seed, stop_at_end=False, given={0: END}) for seed in range(12)]
    texts = complete(DENOISER, algorithm, requests, end_id=END)
    assert any((text.tokens[1:] == END).any() for text in texts)
    assert {len(text.tokens) for text in texts} == {LENGTH}


def test_an_end_in_the_prompt_ends_nothing():
    (text,) = complete(DENOISER, EsoLM(), [Request(length=LENGTH, given={0: END, 1: 2}, seed=5)], end_id=END)
    assert len(text.tokens) > 1


@METHODS
def test_reveals_tell_the_whole_text_once(algorithm):
    requests = requests_for(algorithm)
    reveals, told = list(write(DENOISER, algorithm, requests)), [dict(request.given) for request in requests]
    for reveal in reveals:
        assert not set(reveal.positions) & told[reveal.text].keys()
        told[reveal.text] |= dict(zip(reveal.positions, reveal.tokens, strict=True))
    texts = [text.tokens.tolist() for text in complete(DENOISER, algorithm, requests)]
    assert [[tokens[place] for place in sorted(tokens)] for tokens in told] == texts


def test_diffusion_comes_before_the_sequential_phase_which_goes_left_to_right():
    (request,) = [Request(length=LENGTH, given={3: 1}, seed=4, num_steps=3)]
    reveals = list(write(DENOISER, EsoLM(alpha_0=0.5), [request]))
    phases = [reveal.phase for reveal in reveals]
    assert phases == sorted(phases) and set(phases) == {"diffusion", "sequential"}
    line = [place for reveal in reveals if reveal.phase == "sequential" for place in reveal.positions]
    assert line == sorted(line) and all(len(r.positions) == 1 for r in reveals if r.phase == "sequential")
    assert sum(phase == "diffusion" for phase in phases) <= 3


@METHODS
def test_given_tokens_stand_where_they_were_given(algorithm):
    requests = requests_for(algorithm)
    for request, text in zip(requests, complete(DENOISER, algorithm, requests), strict=True):
        assert {place: int(text.tokens[place]) for place in request.given} == dict(request.given)
        assert text.tokens.max() < VOCAB - 1


@METHODS
def test_a_text_that_is_wholly_given_needs_no_network(algorithm):
    given = {place: place for place in range(8)}
    (text,) = complete(DENOISER, algorithm, [Request(length=8, given=given)])
    assert text.tokens.tolist() == list(range(8))
    assert text.nfe == 0


def test_greedy_writing_takes_the_likeliest_token_each_time():
    request = Request(length=LENGTH, draw=Draw(temperature=0), seed=1)
    (text,) = complete(DENOISER, AR(), [request])
    for place in range(LENGTH):
        logits = from_scratch(DENOISER, AR(), request, place, text.tokens)[0, :-1]
        assert int(logits.argmax()) == text.tokens[place]
    (again,) = complete(DENOISER, AR(), [Request(length=LENGTH, draw=Draw(temperature=0), seed=2)])
    np.testing.assert_array_equal(text.tokens, again.tokens)


def test_seeds_make_texts_differ():
    texts = complete(DENOISER, EsoLM(), [Request(length=LENGTH, seed=seed) for seed in range(20)])
    assert len({tuple(text.tokens.tolist()) for text in texts}) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EsoLM(alpha_0=1.5), r"alpha_0 must lie in \[0, 1\], got 1.5"),
        (lambda: EsoLM().plan(Request(length=4, alpha_0=1.5), generator(0)), r"alpha_0 must lie in \[0, 1\], got 1.5"),
        (lambda: Request(length=4, num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: Request(length=0), "length must be at least 1, got 0"),
        (lambda: Request(length=4, given={4: 1}), r"given positions must lie in \[0, 4\), got 4"),
        (lambda: Request(length=4, given={-1: 1}), r"given positions must lie in \[0, 4\), got -1"),
        (lambda: Draw(temperature=-1), "temperature must be at least 0"),
        (lambda: Draw(top_p=0), r"top_p must lie in \(0, 1\]"),
        (lambda: Draw(temperature=1e-40), r"temperature must be .* lie in \[1e-30, 1e\+30\], got 1e-40"),
        (lambda: Draw(temperature=1e300), r"temperature must be .* lie in \[1e-30, 1e\+30\], got 1e\+300"),
        (lambda: Draw(top_k=0), "top_k must be at least 1"),
        (lambda: Writer(DENOISER, AR(), []), "give at least one request"),
        (lambda: Writer(DENOISER, AR(), [Request(length=17)]), "17 tokens is longer than the model's 16"),
        (lambda: Writer(DENOISER, EsoLM(), [Request(length=4, given={0: 11})]), r"ids lie in \[0, 11\)"),
        (lambda: Writer(DENOISER, EsoLM(), [Request(length=4, given={0: -1})]), r"ids lie in \[0, 11\)"),
        (lambda: Writer(DENOISER, AR(), [Request(length=4, given={1: 1})]), "AR takes a prefix only"),
        (lambda: Writer(DENOISER, AR(), [Request(length=4, num_steps=2)]), "AR takes no num_steps"),
        (lambda: Writer(DENOISER, MDLM(), [Request(length=4, alpha_0=0.5)]), "MDLM takes no alpha_0"),
        (lambda: BD3LM(block_size=0), "block_size must be at least 1"),
        (lambda: EsoLM(variant="C"), "variant must be A or B"),
        (lambda: EsoLM(shuffle_masks=True), r"shuffle_masks is a choice of \(A\)"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("options", [Draw(temperature=0.0), Draw(), Draw(top_p=0.5), Draw(top_k=2)], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_row_with_nothing_to_draw_is_refused_whatever_the_options(options, bad):
    logits = torch.zeros(2, 5)
    logits[1] = bad
    with pytest.raises(ValueError, match="NaN or no token left to draw"):
        draw_rows(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), [options] * 2)


@dataclass(frozen=True, kw_only=True)
class Given(Positions):
    """What a test says."""

    written: tuple[float, ...]
    counts: tuple[int, ...]

    def choose(self, free, alpha_0, num_steps, rng):
        return np.array(self.written), np.array(self.counts)


@pytest.mark.parametrize(
    ("algorithm", "written", "counts", "words"),
    [
        (EsoLM(), (3, 3), (1, 1), "free positions, each once"),
        (EsoLM(), (0,), (1,), "free positions, each once"),  # it is given
        (EsoLM(), (50,), (1,), "free positions, each once"),
        (EsoLM(variant="A"), (1.0, 2.0), (1, 1), "free positions, each once"),
        (EsoLM(), (1, 2, 3), (1, 1), "how many of them each step writes"),  # masks were left in the text
        (EsoLM(), (1, 2), (3, -1), "how many of them each step writes"),
        (MDLM(), (1, 2), (2,), "left 1 positions, and diffusion alone writes here"),
        (BD3LM(block_size=4), (1,), (1,), "left 2 positions, and diffusion alone writes here"),
    ],
)
def test_an_order_of_ones_own_that_is_none_is_refused_by_its_name(algorithm, written, counts, words):
    request = Request(length=4, given={0: 1}, positions=Given(written=written, counts=counts))
    with pytest.raises(ValueError, match=rf"Given.choose .*{words}"):
        complete(DENOISER, algorithm, [request])


def test_an_order_of_ones_own_may_leave_all_to_the_sequential_phase():
    """Empty arrays are of floats, unless one says otherwise, and so were all positions then."""
    request = Request(length=4, positions=Given(written=(), counts=()))
    assert len(complete(DENOISER, EsoLM(), [request])[0].tokens) == 4


WRITES_AT_ONCE = """
import resource
from esolm.algorithms import MDLM, Request
from esolm.denoiser import Config, Denoiser
from esolm.inference import prepared
from esolm.sample import complete
network = prepared(Denoiser(Config(vocab_size=50_258, length=2048, width=32, layers=1, heads=2)), "float32")
complete(network, MDLM(), [Request(length=64, num_steps=1)])  # whatever comes with the first text
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
complete(network, MDLM(), [Request(length=2048, num_steps=1)])
print(peak() - before)
"""


def test_a_step_that_writes_everything_holds_no_array_of_all_logits():
    """2,048 tokens of a vocabulary of 50,258 in one step: all logits would be 393 MiB."""
    done = subprocess.run([sys.executable, "-c", WRITES_AT_ONCE], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) < 150
