"""The sampler: cached equals uncached, texts do not depend on their batch, requests that cannot be met are refused."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM, Request
from esolm.attention import Relation, attends
from esolm.denoiser import Config, Denoiser
from esolm.draw import Draw
from esolm.noise import generator
from esolm.order import Interleaved
from esolm.sample import Writer, complete, write

LENGTH, VOCAB = 16, 23
ALGORITHMS = [
    AR(),
    MDLM(),
    BD3LM(block_size=4),
    EsoLM(variant="A", alpha_0=0.5),
    EsoLM(variant="B", alpha_0=0.5),
    EsoLM(variant="B", alpha_0=1.0),
    EsoLM(variant="A", alpha_0=0.0),
]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    config = Config(vocab_size=VOCAB, length=LENGTH, width=32, layers=2, heads=4, kv_heads=2, qk_norm=True)
    network = Denoiser(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # far from uniform, so that differences show
        for parameter in network.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    return network


def named(algorithm: Algorithm) -> str:
    return repr(algorithm)


def requests_for(algorithm: Algorithm) -> list[Request]:
    """Requests of every kind that the method can take: lengths, prompts, islands, steps, draws."""
    whole = Request(length=LENGTH, seed=1)
    prefix = Request(length=LENGTH, given={0: 3, 1: 4, 2: 5}, seed=2, draw=Draw(temperature=0.7))
    short = Request(length=8, seed=3, draw=Draw(top_k=5))
    if algorithm == AR():
        return [whole, prefix, short]
    islands = Request(length=LENGTH, given={2: 7, 9: 1, 10: 2, 15: 0}, seed=4, num_steps=3)
    return [whole, prefix, short, islands, replace(whole, num_steps=2, seed=5, positions=Interleaved())]


class Uncached(Writer):
    """The same plans with nothing kept: every step feeds every row from the start."""

    def logits_of_step(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(text, rank, logits) of each row that this step draws, from the definition of the plan."""
        for text in self._texts.tolist():
            plans, step = self._plans, self._step
            closed, start, stop, shown = (int(table[text, step]) for table in plans.boundaries)
            ranks = np.arange(shown)
            tokens = self._tokens[text, ranks - plans.shifted].copy()
            if plans.shifted:
                tokens[0] = VOCAB - 1
            else:
                tokens[start:] = VOCAB - 1
            stage = np.where(ranks < start, plans.token_stage[text, ranks], plans.mask_stage[text, ranks])
            public = (ranks < closed) | plans.masks_public
            rows = [torch.from_numpy(array)[None] for array in (tokens, plans.order[text, ranks], stage, public)]
            mask = attends(rows[2], rows[3], rows[2], rows[3])[:, None]
            hidden = self.denoiser(rows[0], rows[1], Relation(mask=mask))
            for rank in range(start, stop):
                yield text, rank, self.denoiser.logits(hidden[0, rank])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
@torch.inference_mode()
def test_cached_equals_uncached_at_every_step_of_a_ragged_batch(algorithm, denoiser):
    writer = Uncached(denoiser, algorithm, requests_for(algorithm))
    rng = np.random.default_rng(0)
    while writer.active:
        wanted = {(text, rank): logits for text, rank, logits in writer.logits_of_step()}
        texts = writer._texts
        hidden, row, rank = writer.evaluate()
        found = denoiser.logits(hidden)
        assert {(int(texts[r]), int(k)) for r, k in zip(row, rank, strict=True)} == wanted.keys()
        for logits, r, k in zip(found, row, rank, strict=True):
            assert torch.allclose(logits, wanted[int(texts[r]), int(k)], atol=1e-5, rtol=1e-5)
        writer.accept(row, rank, rng.integers(0, VOCAB - 1, size=len(rank)))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_a_text_is_the_same_bit_for_bit_alone_and_in_any_batch(algorithm, denoiser):
    requests = requests_for(algorithm)
    together = complete(denoiser, algorithm, requests, end_id=0)
    backwards = complete(denoiser, algorithm, requests[::-1], end_id=0)[::-1]
    for request, first, second in zip(requests, together, backwards, strict=True):
        (alone,) = complete(denoiser, algorithm, [request], end_id=0)
        assert alone.tokens.tolist() == first.tokens.tolist() == second.tokens.tolist()
        assert alone.nfe == first.nfe == second.nfe


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_given_tokens_stand_where_they_were_given_and_every_other_place_is_written_once(algorithm, denoiser):
    for request in requests_for(algorithm):
        (text,) = complete(denoiser, algorithm, [request])
        assert {place: text.tokens[place] for place in request.given} == request.given
        assert len(text.tokens) == request.length and text.tokens.max() < VOCAB - 1
        reveals = list(write(denoiser, algorithm, [request]))
        places = [place for reveal in reveals for place in reveal.positions]
        assert sorted(places) == request.free.tolist()
        assert [text.tokens[place] for place in places] == [t for reveal in reveals for t in reveal.tokens]
        assert text.nfe == len(reveals)


def test_seeds_differ_and_repeat(denoiser):
    texts = [
        complete(denoiser, EsoLM(), [Request(length=LENGTH, seed=seed)])[0].tokens.tolist() for seed in (1, 2, 1)
    ]
    assert texts[0] != texts[1] and texts[0] == texts[2]


@pytest.mark.parametrize("algorithm", [AR(), EsoLM(alpha_0=0.25), BD3LM(block_size=4)], ids=named)
def test_writing_stops_at_the_first_end_of_text_and_leaves_it_out(algorithm, denoiser):
    stopped = 0
    for seed in range(20):
        whole = Request(length=LENGTH, seed=seed, stop_at_end=False)
        (long,) = complete(denoiser, algorithm, [whole], end_id=0)
        (short,) = complete(denoiser, algorithm, [replace(whole, stop_at_end=True)], end_id=0)
        ends = (long.tokens == 0).nonzero()[0]
        length = int(ends[0]) if len(ends) else LENGTH
        assert short.tokens.tolist() == long.tokens[:length].tolist()
        stopped += short.nfe < long.nfe
    assert stopped > 0


@torch.inference_mode()
def test_greedy_takes_the_likeliest_token(denoiser):
    request = Request(length=LENGTH, draw=Draw(temperature=0.0))
    writer = Writer(denoiser, AR(), [request])
    while writer.active:
        hidden, row, rank = writer.evaluate()
        best = denoiser.logits(hidden)[:, :-1].argmax(-1).numpy()
        writer.accept(row, rank, best)
    (text,) = complete(denoiser, AR(), [request])
    assert text.tokens.tolist() == writer.texts()[0].tokens.tolist()


def test_mdlm_skips_evaluations_that_reveal_nothing(denoiser):
    (text,) = complete(denoiser, MDLM(), [Request(length=LENGTH, num_steps=1000, seed=1)])
    assert text.nfe <= LENGTH


def test_a_plan_of_all_diffusion_and_one_step_writes_everything_at_once(denoiser):
    (reveal,) = write(denoiser, EsoLM(alpha_0=1.0), [Request(length=LENGTH, num_steps=1)])
    assert sorted(reveal.positions) == list(range(LENGTH)) and reveal.phase == "diffusion"


def test_interleaved_steps_take_positions_far_apart():
    plan = EsoLM(alpha_0=1.0).plan(Request(length=16, num_steps=4, positions=Interleaved()), generator(0))
    for start, stop in zip(plan.start, plan.stop, strict=True):
        assert set(np.diff(np.sort(plan.order[start:stop]))) == {4}


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        (EsoLM(), {"alpha_0": 1.5}, r"alpha_0 must lie in \[0, 1\], got 1.5"),
        (EsoLM(), {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (EsoLM(), {"length": LENGTH + 1}, "longer than the model's 16"),
        (EsoLM(), {"given": {0: VOCAB - 1}}, r"ids lie in \[0, 22\)"),
        (EsoLM(), {"given": {0: -1}}, "not in the vocabulary"),
        (EsoLM(), {"given": {LENGTH: 1}}, "given positions"),
        (AR(), {"given": {3: 1}}, "prefix only"),
        (AR(), {"alpha_0": 0.5}, "AR takes no alpha_0"),
        (AR(), {"num_steps": 4}, "AR takes no num_steps"),
        (MDLM(), {"alpha_0": 0.5}, "MDLM takes no alpha_0"),
        (BD3LM(block_size=4), {"length": 10}, "not divisible by block_size 4"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_its_reason(algorithm, options, words, denoiser):
    with pytest.raises(ValueError, match=words):
        complete(denoiser, algorithm, [Request(**{"length": LENGTH, **options})])


def test_nothing_to_write_is_said(denoiser):
    with pytest.raises(ValueError, match="nothing to write"):
        complete(denoiser, AR(), [])


def test_weights_that_are_not_numbers_are_said_so(denoiser):
    broken = Denoiser(denoiser.config)
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        complete(broken, AR(), [Request(length=4)])
