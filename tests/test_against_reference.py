"""The authors' numbers, case by case: logits, losses, likelihoods and cached sampling of networks with random weights.

Every `<name>.json` in the folder `ESOLM_REFERENCE_DIR` (default: the copy beside this file) is tried, with its sizes.
"""

import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM, Request, View
from esolm.algorithms.algorithm import Algorithm, Batch
from esolm.attention import relation
from esolm.denoiser import Denoiser
from esolm.importers import from_authors
from esolm.noise import Noise
from esolm.objective import log_probabilities, weighted_cross_entropy
from esolm.order import undo
from esolm.sample import Writer
from esolm.schedule import EPSILON, LogLinear

FOLDER = Path(os.environ.get("ESOLM_REFERENCE_DIR", Path(__file__).parent / "reference"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
CLOSE = 1e-5
SUMMED = 1e-4


@dataclass(frozen=True)
class Reference:
    """One set of cases with its networks."""

    name: str

    @cached_property
    def sizes(self):
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    @cached_property
    def cases(self):
        return load_file(FOLDER / f"{self.name}.cases.safetensors")

    @cached_property
    def blocks(self):
        return load_file(FOLDER / f"{self.name}.bd3lm.cases.safetensors")

    @cache  # noqa: B019 - a handful of networks, for the length of the run
    def network(self, kind: str) -> Denoiser:
        config, weights = from_authors(
            load_file(FOLDER / f"{self.name}.{kind}.weights.safetensors"), self.sizes["length"]
        )
        assert config.heads == self.sizes["n_heads"] and config.layers == self.sizes["n_blocks"]
        assert config.mask_id == self.sizes["mask_index"]
        denoiser = Denoiser(config).eval()
        denoiser.load_state_dict(weights)
        return denoiser

    def batch(self, tokens):
        return Batch.of(tokens)


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


def test_there_is_a_reference_to_match():
    if not FOLDER.is_dir():
        pytest.skip(f"NOTHING WAS COMPARED: no folder {FOLDER}; set ESOLM_REFERENCE_DIR to one with <name>.json")
    assert NAMES, f"no <name>.json in {FOLDER}"


@torch.no_grad()
def logits_of(denoiser: Denoiser, view: View):
    hidden = denoiser(view.tokens, view.positions, relation(view.stage, view.public))
    return denoiser.logits(hidden)


@torch.no_grad()
def losses_of(denoiser: Denoiser, view: View):
    """Weighted nll of each row through the objective that training uses."""
    hidden = denoiser(view.tokens, view.positions, relation(view.stage, view.public))
    _, nll = weighted_cross_entropy(hidden.flatten(0, 1), denoiser.head, view.targets.flatten(), view.weights.flatten())
    return nll.view(view.targets.shape) * view.weights


def assert_close(ours, theirs, within=CLOSE):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < within


def without_mask(logits):
    return logits[..., :-1]


def masked_in_text(sorted_tokens, order, mask_id):
    return undo(sorted_tokens == mask_id, order)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_diffusion_logits_and_losses(reference, variant):
    case = {k.rsplit(".", 1)[1]: v for k, v in reference.cases.items() if k.startswith(f"{variant}.diffusion.")}
    denoiser, mask_id = reference.network("esolm"), reference.sizes["mask_index"]
    algorithm = EsoLM(variant=variant, alpha_0=reference.sizes[f"{variant}.alpha_0"])
    schedule = LogLinear(alpha_0=algorithm.alpha_0)
    t = case["t"].double()
    assert_close(schedule.alpha(t), case["alpha_t"].double(), 1e-6)
    masked = masked_in_text(case["zt_sorted"], case["order"], mask_id)
    batch = Batch.of(reference.cases["x0"])
    for weight, name in ((schedule.weight(t), "nll_elbo"), (torch.ones_like(t), "nll_low_var")):
        view = algorithm.diffusion_of(batch, masked, case["order"], weight[:, None], mask_id)
        assert torch.equal(view.tokens, case["zt_sorted"])
        assert_close(without_mask(logits_of(denoiser, view)), without_mask(case["logits"]))
        scale = max(1.0, case[name].abs().max().item())
        assert_close(losses_of(denoiser, view) / scale, case[name] / scale)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_sequential_logits_and_losses(reference, variant):
    case = {k.rsplit(".", 1)[1]: v for k, v in reference.cases.items() if k.startswith(f"{variant}.sequential.")}
    denoiser, mask_id = reference.network("esolm"), reference.sizes["mask_index"]
    algorithm = EsoLM(variant=variant, alpha_0=reference.sizes[f"{variant}.alpha_0"])
    masked = masked_in_text(case["z0_sorted"], case["order"], mask_id)
    view = algorithm.sequential_of(Batch.of(reference.cases["x0"]), masked, case["order"], mask_id)
    rows = view.tokens.shape[1] - (case["order"].shape[1] - 1)  # masks come first
    here = case["z0_sorted"][:, -rows:] == mask_id
    ours = logits_of(denoiser, view)[:, :rows]
    assert_close(without_mask(ours)[here], without_mask(case["logits"])[:, -rows:][here])
    losses = torch.zeros_like(case["nll"])
    losses[:, -rows:] = losses_of(denoiser, view)[:, :rows]
    assert_close(losses, case["nll"])


def test_exact_likelihood_of_an_order(reference):
    cases, denoiser = reference.cases, reference.network("esolm")
    order = cases["B.exact.order"]
    view = EsoLM(alpha_0=0.5).exact(Batch.of(cases["x0"]), order, reference.sizes["mask_index"])
    logp = -losses_of(denoiser, view)[:, : order.shape[1]]
    assert_close(logp, cases["B.exact.logp_per_token"])
    assert_close(logp.sum(1), cases["B.exact.logp"], SUMMED)


def test_cached_sampling_with_given_tokens(reference):
    cases, denoiser = reference.cases, reference.network("esolm")
    order, tokens = cases["B.sampling.order"], cases["B.sampling.tokens_sorted"]
    widths = torch.tensor(reference.sizes["B.sampling.schedule"])
    for text in range(len(order)):  # alone, then all together below
        assert_close(*forced(denoiser, order[text : text + 1], tokens[text : text + 1], widths, cases, text))
    assert_close(*forced(denoiser, order, tokens, widths, cases, slice(None)))


@torch.inference_mode()
def forced(denoiser, order, tokens, widths, cases, which):
    """Logits of a writer whose steps are decided by the case, beside the case's."""
    requests = [Request(length=order.shape[1], seed=seed) for seed in range(len(order))]
    algorithm = Scripted(orders=order.tolist(), widths=tuple(widths.tolist()))
    writer, steps = Writer(denoiser, algorithm, requests), []
    while writer.active:
        hidden, text, rank = writer.evaluate()
        steps.append(denoiser.logits(hidden).view(len(order), -1, denoiser.config.vocab_size))
        writer.accept(text, rank, tokens.numpy()[text, rank])
    theirs = cases["B.sampling.logits"][which].view(len(order), order.shape[1], -1)
    return without_mask(torch.cat(steps, dim=1)), without_mask(theirs)


@dataclass(frozen=True, kw_only=True)
class Scripted(EsoLM):
    """Eso-LM (B) that writes in given orders by given widths, every step of the diffusion kind."""

    orders: list
    widths: tuple

    def plan(self, request, rng):
        from dataclasses import replace

        import numpy as np

        stop = np.cumsum(self.widths)
        start = stop - np.array(self.widths)
        plan = super().plan(request, rng)
        return replace(
            plan,
            order=np.array(self.orders[request.seed % len(self.orders)]),
            closed=start,
            start=start,
            stop=stop,
            shown=stop,
            sequential=np.zeros(len(stop), dtype=bool),
        )


def test_mdlm_logits_and_losses(reference):
    cases, denoiser, mask_id = reference.cases, reference.network("mdlm"), reference.sizes["mask_index"]
    z, t = cases["mdlm.zt"], cases["mdlm.t"].double()
    assert_close(LogLinear().alpha(t), cases["mdlm.alpha_t"].double(), 1e-6)
    view = MDLM().view_of(Batch.of(cases["x0"]), z != mask_id, t[:, None], mask_id)
    assert_close(without_mask(logits_of(denoiser, view)), without_mask(cases["mdlm.logits"]))
    assert_close(losses_of(denoiser, view), cases["mdlm.nll_elbo"])


def test_ar_logits_and_losses(reference):
    cases, denoiser, mask_id = reference.cases, reference.network("ar"), reference.sizes["mask_index"]
    (view,) = AR().views(Batch.of(cases["x0"]), Noise(seed=0, step=0, start=0, stop=3, total=3), mask_id)
    assert torch.equal(view.tokens, cases["ar.input"])
    assert_close(without_mask(logits_of(denoiser, view)), without_mask(cases["ar.logits"]))
    assert_close(losses_of(denoiser, view), cases["ar.nll"])


def test_bd3lm_logits_and_losses(reference):
    cases, denoiser, mask_id = reference.blocks, reference.network("bd3lm"), reference.sizes["mask_index"]
    sizes = sorted(int(key.split(".")[0].removeprefix("block")) for key in cases if key.endswith(".zt"))
    assert sizes
    for size in sizes:
        z, probability = cases[f"block{size}.zt"], cases[f"block{size}.mask_prob"].double()
        view = BD3LM(block_size=size).view_of(Batch.of(cases["x0"]), z != mask_id, probability, mask_id)
        length = z.shape[1]
        assert_close(without_mask(logits_of(denoiser, view)[:, :length]), without_mask(cases[f"block{size}.logits"]))
        assert_close(losses_of(denoiser, view)[:, :length], cases[f"block{size}.nll_weighted"])


def test_folding_the_time_conditioning_is_exact(reference):
    """Folded in float64 on both sides, our norm and gate equal adaLN's to float32 rounding of the stored weights."""
    tensors = load_file(FOLDER / f"{reference.name}.esolm.weights.safetensors")
    _, ours = from_authors(tensors, reference.sizes["length"])
    source = {name: tensor.double() for name, tensor in tensors.items()}
    time = torch.cat((torch.ones(128), torch.zeros(128))).double()
    silu = torch.nn.functional.silu
    hidden = silu(source["sigma_map.mlp.0.weight"] @ time + source["sigma_map.mlp.0.bias"])
    condition = silu(source["sigma_map.mlp.2.weight"] @ hidden + source["sigma_map.mlp.2.bias"])
    ada = source["blocks.0.adaLN_modulation.weight"] @ condition + source["blocks.0.adaLN_modulation.bias"]
    shift, scale, gate = ada.chunk(6)[:3]
    x = torch.randn(7, len(shift), generator=torch.Generator().manual_seed(0)).double()
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:]) * source["blocks.0.norm1.weight"]
    ours_normed = torch.nn.functional.layer_norm(x, x.shape[-1:]) * ours["blocks.0.norm1.weight"].double()
    assert_close(ours_normed + ours["blocks.0.norm1.bias"].double(), normed * (1 + scale) + shift, 1e-6)
    theirs_out = gate * (x @ source["blocks.0.attn_out.weight"].T)
    assert_close(x @ ours["blocks.0.out.weight"].double().T, theirs_out, 1e-6)


def test_losses_are_zero_at_clean_tokens(reference):
    cases = reference.cases
    assert (
        float(cases["B.diffusion.nll_elbo"][cases["B.diffusion.zt_sorted"] != reference.sizes["mask_index"]].sum()) == 0
    )


def test_epsilon_is_the_authors(reference):
    assert reference.sizes["dalpha_dt"] == pytest.approx(-(1 - EPSILON) * reference.sizes["B.alpha_0"])


def test_log_probabilities_leave_the_mask_out(reference):
    logits = reference.cases["ar.logits"]
    nll = -log_probabilities(logits).gather(-1, reference.cases["x0"][..., None])[..., 0]
    assert_close(nll, reference.cases["ar.nll"])


def test_every_algorithm_is_compared(reference):
    kinds = {AR, BD3LM, MDLM, EsoLM}
    assert kinds == {kind for kind in Algorithm.__subclasses__() if kind.__module__.startswith("esolm.algorithms")}
