"""The objective: the fused loss is the plain one, methods meet at the ends of alpha_0, prompts and padding are inert.

The other sides here are `log_softmax` in float64, other methods under the same noise, and the authors' adaLN written
out.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from esolm import objective
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.attention import attends
from esolm.noise import Noise
from esolm.objective import log_probabilities, of_view, weighted_cross_entropy
from slow import network, slow_logits

VOCAB, LENGTH, TEXTS = 12, 8, 6
MASK_ID = VOCAB - 1
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A", alpha_0=0.5), EsoLM(variant="B", alpha_0=0.5)]
METHODS = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["AR", "MDLM", "BD3LM", "A", "B"])
NOISE = Noise(seed=2, step=5, start=0, stop=TEXTS, total=TEXTS)


def case(rows: int = 23, width: int = 8, vocab: int = 37, bias: bool = True, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, vocab, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    hidden = torch.randn(rows, width, generator=generator)
    targets = torch.randint(0, vocab - 1, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * (torch.arange(rows) % 3 > 0)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), targets, weights


def plain(hidden, head, targets, weights):
    """Loss, nll and gradients by way of all the logits, in float64."""
    hidden, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_()
    nll = F.cross_entropy(F.linear(hidden, weight, bias)[:, :-1], targets, reduction="none")
    loss = (weights.double() * nll).sum()
    loss.backward()
    grads = [hidden.grad, weight.grad] + ([] if bias is None else [bias.grad])
    return loss.detach(), nll.detach(), grads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("held", [512, 5, 1])
def test_the_fused_loss_and_its_gradients_are_the_plain_ones_however_it_is_cut(held, bias, monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK_ROWS", held)
    hidden, head, targets, weights = case(bias=bias)
    loss, nll = weighted_cross_entropy(hidden, head, targets, weights)
    (3 * loss).backward()  # a factor from outside reaches every gradient
    expected_loss, expected_nll, expected_grads = plain(hidden, head, targets, weights)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=0, atol=5e-6)
    for parameter, expected in zip([hidden, *head.parameters()], expected_grads, strict=True):
        torch.testing.assert_close(parameter.grad.double(), 3 * expected, rtol=0, atol=1e-5)
    assert not nll.requires_grad


def test_the_mask_has_no_probability_and_no_gradient():
    hidden, head, targets, weights = case()
    loss, _ = weighted_cross_entropy(hidden, head, targets, weights)
    loss.backward()
    assert head.weight.grad[-1].abs().max() == 0 == head.bias.grad[-1]
    with torch.no_grad():
        head.bias[-1] = 50
    torch.testing.assert_close(weighted_cross_entropy(hidden, head, targets, weights)[0], loss)
    logits = head(hidden)
    probabilities = log_probabilities(logits).exp()
    assert (probabilities[:, -1] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(logits)))


def test_the_loss_holds_a_chunk_of_logits_and_never_all(monkeypatch):
    rows, vocab, width = 64, 500, 8
    monkeypatch.setattr(objective, "_CHUNK_ROWS", 8)
    hidden, head, targets, weights = case(rows, width, vocab)
    with Largest() as watched:
        loss, _ = weighted_cross_entropy(hidden, head, targets, weights)
        loss.backward()
    assert watched.elements == 8 * vocab  # also the size of the head's weight


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while this is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = case()
    with torch.no_grad():
        head.weight *= 1e3
    loss, _ = weighted_cross_entropy(hidden, head, targets, weights)
    loss.backward()
    torch.testing.assert_close(loss.double(), plain(hidden, head, targets, weights)[0], rtol=1e-5, atol=0)
    assert torch.isfinite(hidden.grad).all()


def test_under_autocast_the_loss_is_near_and_gradients_keep_the_weights_dtype():
    hidden, head, targets, weights = case()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_cross_entropy(hidden, head, targets, weights)
    loss.backward()
    expected, _, grads = plain(hidden, head, targets, weights)
    assert abs(float(loss.detach() / expected) - 1) < 0.02
    for parameter, theirs in zip([hidden, *head.parameters()], grads, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad - theirs).norm() < 0.02 * theirs.norm()


@METHODS
def test_the_loss_of_a_view_and_its_gradients_are_those_of_all_logits(algorithm):
    """Through the whole network: rows without a target are left out, and nothing else changes."""
    denoiser = network(vocab_size=VOCAB, length=LENGTH)
    view = algorithm.views(texts(), NOISE, MASK_ID)[-1]
    loss, rows = of_view(denoiser, view)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in denoiser.named_parameters()}
    denoiser.zero_grad()
    logits = by_definition(denoiser, view)
    nll = F.cross_entropy(logits[..., :-1].flatten(0, 1), view.targets.flatten(), reduction="none")
    weighted = nll.view(view.weights.shape) * view.weights
    weighted.sum().backward()
    torch.testing.assert_close(rows.double(), weighted.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(loss.double(), weighted.sum(), rtol=1e-5, atol=0)
    for name, parameter in denoiser.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


@METHODS
def test_in_bf16_targets_are_filled_up_to_a_multiple_and_nothing_changes(algorithm, monkeypatch):
    """Row zero stands in for what is missing, with a weight of zero, also where it has a target of its own."""
    denoiser = network(vocab_size=VOCAB, length=LENGTH)
    view = algorithm.views(texts(), NOISE, MASK_ID)[-1]
    asked, inner = [], weighted_cross_entropy

    def recorded(hidden, *rest):
        asked.append(len(hidden))
        return inner(hidden, *rest)

    monkeypatch.setattr(objective, "weighted_cross_entropy", recorded)
    found = []
    count = int((view.weights != 0).sum())
    for multiple in 1, count + 1:
        monkeypatch.setattr(objective, "MULTIPLE", multiple)
        denoiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, rows = of_view(denoiser, view)
        loss.backward()
        found.append((loss.detach(), rows, {name: p.grad.clone() for name, p in denoiser.named_parameters()}))
    of_view(denoiser, view)
    assert asked == [count, count + 1, count]  # in float32 no kernels are made for each size
    (loss, rows, grads), (filled_loss, filled_rows, filled_grads) = found
    assert (filled_rows == 0).equal(view.weights == 0)
    torch.testing.assert_close(filled_rows, rows, rtol=2e-3, atol=0)
    torch.testing.assert_close(filled_loss, loss, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        assert (filled_grads[name] - grad).norm() <= 1e-2 * grad.norm(), name


def by_definition(denoiser, view):
    reads = attends(view.stage, view.public, view.stage, view.public)
    weights = {name: parameter.double() for name, parameter in denoiser.named_parameters()}
    return slow_logits(denoiser, view.tokens, view.positions, reads[:, None], weights)


def distinct(seed: int = 0, *, given: tuple[int, ...] = (), padding: int = 0) -> Batch:
    """Texts whose tokens are all different, so that a token tells its place."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(MASK_ID, generator=generator)[:LENGTH] for _ in range(TEXTS)])
    flags, valid = torch.zeros_like(tokens).bool(), torch.ones_like(tokens).bool()
    flags[:, list(given)] = True
    valid[1::2, LENGTH - padding :] = False
    return Batch(tokens=tokens, given=flags & valid, valid=valid)


def terms(view) -> dict:
    """What a view asks: at each text and place, the weight, the token asked for and the tokens that are read."""
    reads = attends(view.stage, view.public, view.stage, view.public)
    asked = {}
    for text, row in view.weights.nonzero().tolist():
        read = view.tokens[text][reads[text, row]]
        place = (text, int(view.positions[text, row]))
        assert place not in asked
        asked[place] = (
            float(view.weights[text, row]),
            int(view.targets[text, row]),
            sorted(read[read != MASK_ID].tolist()),
        )
    return asked


PROMPTS = pytest.mark.parametrize(("given", "padding"), [((), 0), ((0, 1), 0), ((0, 1), 3)])


@PROMPTS
@pytest.mark.parametrize("variant", ["A", "B"])
def test_at_alpha_0_of_one_eso_lm_asks_what_mdlm_asks(variant, given, padding):
    batch, algorithm = distinct(given=given, padding=padding), EsoLM(variant=variant, alpha_0=1.0)
    for ours, theirs in (
        (algorithm.bound(batch, NOISE, MASK_ID), MDLM().bound(batch, NOISE, MASK_ID)),
        (algorithm.views(batch, NOISE, MASK_ID), MDLM().views(batch, NOISE, MASK_ID)),
        (
            replace(algorithm, low_variance=True).views(batch, NOISE, MASK_ID),
            MDLM(low_variance=True).views(batch, NOISE, MASK_ID),
        ),
    ):
        assert len(ours) == 1
        assert terms(ours[0]) == terms(theirs[0])
        assert ours[0].num_tokens == theirs[0].num_tokens


@PROMPTS
@pytest.mark.parametrize("variant", ["A", "B"])
def test_at_alpha_0_of_zero_eso_lm_asks_what_ar_asks(variant, given, padding):
    batch, algorithm = distinct(given=given, padding=padding), EsoLM(variant=variant, alpha_0=0.0)
    for ours in (algorithm.bound(batch, NOISE, MASK_ID), algorithm.views(batch, NOISE, MASK_ID)):
        assert len(ours) == 1
        assert terms(ours[0]) == terms(AR().bound(batch, NOISE, MASK_ID)[0])
        assert ours[0].num_tokens == int(batch.scored.sum())


@pytest.mark.parametrize("split", [0.25, 0.5])
def test_every_text_of_a_batch_is_in_one_of_the_two_terms(split):
    batch = distinct()
    diffusion, sequential = EsoLM(batch_split=split).views(batch, NOISE, MASK_ID)
    assert len(diffusion.tokens) == int(TEXTS * split)
    assert diffusion.num_tokens == diffusion.tokens.numel()
    assert sequential.num_tokens == (TEXTS - int(TEXTS * split)) * LENGTH
    texts = [set(enumerate(text)) for text in batch.tokens.tolist()]
    shown = [pairs for view in (diffusion, sequential) for pairs in places_and_tokens(view)]
    assert sorted(number for pairs in shown for number in range(TEXTS) if pairs <= texts[number]) == list(range(TEXTS))


def places_and_tokens(view) -> list[set]:
    """For each text of a view, what stands where: by the rows that hold a token, and by what is asked for."""
    asked, found = terms(view), []
    for text in range(len(view.tokens)):
        rows = zip(view.positions[text].tolist(), view.tokens[text].tolist(), strict=True)
        found.append({(place, token) for place, token in rows if token != MASK_ID})
        found[-1] |= {(place, token) for (other, place), (_, token, _) in asked.items() if other == text}
    return found


@METHODS
def test_only_scored_tokens_are_asked_for(algorithm):
    batch = distinct(given=(0, 1), padding=3)
    scored = {tuple(place) for place in batch.scored.nonzero().tolist()}
    for view in algorithm.bound(batch, NOISE, MASK_ID):
        assert terms(view).keys() <= scored
        assert view.num_tokens == len(scored)
        assert algorithm != AR() or terms(view).keys() == scored


@torch.no_grad()
def losses(views) -> list[dict]:
    """For each view, the weighted nll of each text and place that is scored."""
    found = []
    for view in views:
        _, rows = of_view(network(vocab_size=VOCAB, length=LENGTH), view)
        places = view.weights.nonzero().tolist()
        found.append({(text, int(view.positions[text, row])): float(rows[text, row]) for text, row in places})
    return found


def assert_same(ours: list[dict], theirs: list[dict], *, texts=range(TEXTS)) -> None:
    for one, other in zip(ours, theirs, strict=True):
        kept = {place: loss for place, loss in one.items() if place[0] in texts}
        assert kept
        assert kept == pytest.approx({place: loss for place, loss in other.items() if place[0] in texts}, abs=1e-4)


@METHODS
def test_what_padding_holds_changes_nothing(algorithm):
    batch = distinct(given=(0, 1), padding=3)
    other = replace(batch, tokens=batch.tokens.where(batch.valid, distinct(seed=1).tokens))
    for ask in (algorithm.bound, algorithm.views):
        assert_same(losses(ask(batch, NOISE, MASK_ID)), losses(ask(other, NOISE, MASK_ID)))


@METHODS
def test_a_text_does_not_change_another(algorithm):
    batch, other = distinct(given=(0, 1), padding=3), distinct(seed=1).tokens
    other[:2] = batch.tokens[:2]
    ours, theirs = (losses(algorithm.bound(replace(batch, tokens=x), NOISE, MASK_ID)) for x in (batch.tokens, other))
    assert_same(ours, theirs, texts=(0, 1))
    assert ours != theirs


@METHODS
def test_a_prompt_is_read(algorithm):
    batch, other = distinct(given=(0, 1)), distinct(seed=1)
    other = replace(batch, tokens=other.tokens.where(batch.given, batch.tokens))
    ours, theirs = (losses(algorithm.bound(x, NOISE, MASK_ID))[-1] for x in (batch, other))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[place] - theirs[place]) for place in ours) > 0.1


@METHODS
def test_a_padded_text_scores_as_the_text_alone(algorithm):
    """The masks and orders are given here: those of the noise depend on the length."""
    long, short = distinct(given=(0,), padding=4), distinct(given=(0,))
    cut = Batch(tokens=short.tokens[1::2, :4], given=short.given[1::2, :4], valid=short.valid[1::2, :4])
    padded = long[torch.arange(1, TEXTS, 2)]
    assert_same(losses(hand_masked(algorithm, padded)), losses(hand_masked(algorithm, cut)), texts=range(TEXTS // 2))


def hand_masked(algorithm, batch: Batch) -> list:
    count, length = batch.tokens.shape
    masked = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]).bool()[:length] & batch.scored
    half = torch.full((count, 1), 0.5).double()
    order = torch.tensor([0, 2, 1, 3, 5, 4, 7, 6])[:length].expand(count, -1)
    if isinstance(algorithm, EsoLM):
        diffusion = algorithm.diffusion_of(batch, masked, order, half, MASK_ID)
        return [
            diffusion,
            algorithm.sequential_of(batch, masked, order, MASK_ID),
            algorithm.exact(batch, order, MASK_ID),
        ]
    if isinstance(algorithm, BD3LM):
        return [algorithm.view_of(batch, ~masked, half.expand(-1, length), MASK_ID)]
    if isinstance(algorithm, MDLM):
        return [algorithm.view_of(batch, ~masked, half, MASK_ID)]
    return list(algorithm.bound(batch, NOISE, MASK_ID))


def texts(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.of(torch.randint(0, MASK_ID, (TEXTS, LENGTH), generator=generator))
