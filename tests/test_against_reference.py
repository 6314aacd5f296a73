"""The authors' numbers, case by case: logits, losses, likelihoods and cached sampling of networks with random weights.

Every `<name>.json` in the folder `ESOLM_REFERENCE_DIR` (default: the copy beside this file) is tried with its
companions `<name>.cases`, `<name>.bd3lm.cases`, `<name>.KIND.weights` and `<name>.esolm.lightning.ckpt`. Sizes, shares
and block sizes come from the files. A companion that is not there is said to be missing; a case or a network that
nobody here compares is an error.

The two sets beside this file were made by running the authors' public code (s-sahoo/Eso-LMs, kuleshov-group/bd3lms) in
float32 on a CPU with random weights: `a` with 4 heads, 2 layers, vocabulary 96, 3 texts of 32 tokens, both alpha_0 at
0.5, blocks of 4 and 16; `b` with 1 head, 3 layers, vocabulary 13, 5 texts of 24, alpha_0 of 0.125 (A) and 0.75 (B),
blocks of 1, 2 and the whole text, and lists in the settings of its training file.
"""

import json
import os
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from esolm import checkpoint, native
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM, Request, View
from esolm.algorithms.algorithm import Batch
from esolm.attention import relation
from esolm.denoiser import Denoiser
from esolm.engine import Engine
from esolm.importers import from_authors, import_model
from esolm.inference import Inference
from esolm.objective import log_probabilities, weighted_cross_entropy
from esolm.order import undo
from esolm.sample import Writer
from esolm.schedule import EPSILON, LogLinear

FOLDER = Path(os.environ.get("ESOLM_REFERENCE_DIR") or Path(__file__).parent / "reference")
NAMES = sorted(path.name.removesuffix(".json") for path in FOLDER.glob("*.json"))
CLOSE = 1e-5
SUMMED = 1e-4
ENOUGH = 256  # logits, to tell a mean of their errors
CASES = {  # what is compared below, by the test that does it
    *(f"{variant}.{kind}" for variant in "AB" for kind in ("diffusion", "sequential")),
    "B.exact",
    "B.sampling",
    "mdlm",
    "ar",
}
TRAINED = "esolm.lightning.ckpt"


@dataclass(frozen=True)
class Reference:
    """One set of cases with its networks."""

    name: str

    @cached_property
    def sizes(self):
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    @property
    def mask_id(self):
        return self.sizes["mask_index"]

    @property
    def files(self):
        """Companions of this set: `a.b.cases` belongs to the set `a.b` where there is one, else to `a`."""
        mine = (path for path in FOLDER.iterdir() if path.name.startswith(f"{self.name}.") and path.suffix != ".json")
        longer = [f"{name}." for name in NAMES if name.startswith(f"{self.name}.")]
        return {path.name.removeprefix(f"{self.name}.") for path in mine if not path.name.startswith(tuple(longer))}

    @property
    def companions(self):
        """The files of cases that there are."""
        return [name for name in ("cases", "bd3lm.cases") if f"{name}.safetensors" in self.files]

    @cache  # noqa: B019 - a handful of small files, for the length of the run
    def tensors(self, companion):
        name = f"{companion}.safetensors"
        if name not in self.files:
            pytest.skip(f"NOT COMPARED: there is no {self.name}.{name} in {FOLDER}")
        return load_file(FOLDER / f"{self.name}.{name}")

    def case(self, prefix, companion="cases"):
        """The tensors of one case; `x0` is that of its file."""
        tensors = self.tensors(companion)
        found = {key.removeprefix(f"{prefix}."): v for key, v in tensors.items() if key.startswith(f"{prefix}.")}
        if not found:
            pytest.skip(f"NOT COMPARED: there is no case {prefix} in {self.name}.{companion}")
        return found | {"x0": tensors["x0"]}

    def algorithm(self, variant):
        return EsoLM(variant=variant, alpha_0=self.sizes[f"{variant}.alpha_0"])

    @cache  # noqa: B019
    def network(self, kind: str) -> Denoiser:
        # a case without its network is no comparison to leave out: the file must be there
        weights = load_file(FOLDER / f"{self.name}.{kind}.weights.safetensors")
        config, ours = from_authors(weights, self.sizes["length"])
        told = {name: self.sizes[name] for name in ("n_heads", "n_blocks", "hidden_size", "vocab_size", "mask_index")}
        assert told == {
            "n_heads": config.heads,
            "n_blocks": config.layers,
            "hidden_size": config.width,
            "vocab_size": config.vocab_size,
            "mask_index": config.mask_id,
        }
        denoiser = Denoiser(config).eval()
        denoiser.load_state_dict(ours)
        return denoiser


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


def test_there_is_a_reference_to_match():
    if not FOLDER.is_dir():
        pytest.skip(f"NOTHING WAS COMPARED: no folder {FOLDER}; set ESOLM_REFERENCE_DIR to one with <name>.json")
    assert NAMES, f"no <name>.json in {FOLDER}"


def test_every_case_of_a_set_is_compared(reference):
    names = {name.removesuffix(".safetensors") for name in reference.files if name.endswith(".safetensors")}
    assert names <= {"cases", "bd3lm.cases", *(f"{kind}.weights" for kind in ("esolm", "mdlm", "ar", "bd3lm"))}
    assert {name for name in reference.files if name.endswith(".ckpt")} <= {TRAINED}
    found = {name: set(reference.tensors(name)) - {"x0"} for name in reference.companions}
    assert any(found.values()), "there is nothing to compare"
    assert {key.rpartition(".")[0] for key in found.get("cases", ())} <= CASES
    for key in found.get("bd3lm.cases", ()):
        assert key.split(".")[0].removeprefix("block").isdecimal(), key


def test_shapes_are_those_of_the_json(reference):
    batch, length, vocab = (reference.sizes[name] for name in ("batch", "length", "vocab_size"))
    for companion in reference.companions:
        for key, tensor in reference.tensors(companion).items():
            kind = key.rsplit(".", 1)[-1]
            last = (vocab,) if kind == "logits" else ()
            assert tensor.shape == ((batch,) if kind in ("t", "alpha_t", "logp") else (batch, length, *last)), key


def assert_close(ours, theirs, within=CLOSE):
    """`ours`: values, or a network and how they follow from it. Where float32 itself cannot tell `within` (a wide
    network), the error may be four times what our own float32 pass differs from the same pass in float64."""
    follow, network = ours if isinstance(ours, tuple) else (lambda _: ours, None)
    values = follow(network).double()
    assert values.shape == theirs.shape
    error = float((values - theirs.double()).abs().amax()) if values.numel() else 0.0
    if network is not None and error >= within:
        within = 4 * float((values - follow(deepcopy(network).double()).double()).abs().max())
    assert error < within


def assert_logits(ours, theirs):
    """Close, and no further from the network in float64 than float32 is: in the mean they are one pass in float32, so
    that a single weight that is 1e-3 off shows, though it may move no logit by 1e-5. Nor are ours, by any network."""
    assert_close(ours, theirs)
    follow, network = ours
    if theirs.numel() >= ENOUGH:
        exact = follow(deepcopy(network).double()).double()
        ours32, theirs32 = ((x - exact).square().mean().sqrt() for x in (follow(network), theirs))
        assert theirs32 < 3 * ours32
        assert ours32 < 3 * theirs32


@torch.no_grad()
def hidden_of(denoiser: Denoiser, view: View):
    return denoiser(view.tokens, view.positions, relation(view.stage, view.public))


def logits_of(view: View, denoiser: Denoiser, rows=slice(None)):
    """Logits of rows, the mask's left out."""
    return lambda network: network.logits(hidden_of(network, view)).detach()[:, rows, :-1], denoiser


def nll_of(view: View, denoiser: Denoiser, rows=slice(None)):
    """The nll of rows with a target, by the objective that training uses; 0 of the others."""

    def follow(network):
        hidden, weights = hidden_of(network, view).flatten(0, 1), view.weights.flatten()
        _, nll = weighted_cross_entropy(hidden, network.head, view.targets.flatten(), weights)
        return nll.view(view.weights.shape)[:, rows] * (view.weights != 0)[:, rows]

    return follow, denoiser


def assert_losses(view: View, denoiser: Denoiser, theirs, rows=slice(None)):
    """Losses over their weights: at t near 0 a weight is in the hundreds, and so would be the rounding of a loss.

    Their weight is `1 / (1 - alpha_t)` in float32, which rounds `alpha_t`: of a loss over its weight that is as large a
    part of the loss itself as one rounding.
    """
    weights = view.weights[:, rows].double()
    assert not bool(theirs[weights == 0].any())
    rounding = 2.0**-23 * theirs.abs() if view.term == "diffusion" else 0 * weights
    follow, network = nll_of(view, denoiser, rows)
    exact = theirs.double() / weights.masked_fill(weights == 0, 1)
    near = (follow(network).double() - exact).abs() <= rounding
    assert_close((lambda n: follow(n).double().where(~near, exact), network), exact)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_diffusion_logits_and_losses(reference, variant):
    case, denoiser = reference.case(f"{variant}.diffusion"), reference.network("esolm")
    algorithm, mask_id = reference.algorithm(variant), reference.mask_id
    schedule, t = LogLinear(alpha_0=algorithm.alpha_0), case["t"].double()
    assert_close(schedule.alpha(t), case["alpha_t"], 1e-6)
    masked = undo(case["zt_sorted"] == mask_id, case["order"])
    for weight, name in ((schedule.weight(t), "nll_elbo"), (torch.ones_like(t), "nll_low_var")):
        view = algorithm.diffusion_of(Batch.of(case["x0"]), masked, case["order"], weight[:, None], mask_id)
        assert torch.equal(view.tokens, case["zt_sorted"])
        assert_logits(logits_of(view, denoiser), case["logits"][..., :-1])
        assert_losses(view, denoiser, case[name])


@pytest.mark.parametrize("variant", ["A", "B"])
def test_sequential_logits_and_losses(reference, variant):
    case, denoiser, mask_id = reference.case(f"{variant}.sequential"), reference.network("esolm"), reference.mask_id
    masked = undo(case["z0_sorted"] == mask_id, case["order"])
    view = reference.algorithm(variant).sequential_of(Batch.of(case["x0"]), masked, case["order"], mask_id)
    length = case["order"].shape[1]
    rows = view.tokens.shape[1] - (length - 1)  # masks come first, one for each of the last ranks
    assert torch.equal(case["x0"].gather(1, case["order"]), case["x0_sorted"])
    here = case["z0_sorted"][:, length - rows :] == mask_id
    follow, _ = logits_of(view, denoiser, slice(rows))
    assert_logits((lambda network: follow(network)[here], denoiser), case["logits"][:, length - rows :, :-1][here])
    assert_losses(view, denoiser, case["nll"][:, length - rows :], slice(rows))
    assert not bool(case["nll"][:, : length - rows].any())


def test_exact_likelihood_of_an_order(reference):
    case, denoiser = reference.case("B.exact"), reference.network("esolm")
    order = case["order"]
    view = reference.algorithm("B").exact(Batch.of(case["x0"]), order, reference.mask_id)
    follow, _ = nll_of(view, denoiser, slice(order.shape[1]))
    assert_close((lambda network: -follow(network), denoiser), case["logp_per_token"])
    assert_close((lambda network: -follow(network).sum(1), denoiser), case["logp"], SUMMED)


def test_cached_sampling_with_given_tokens(reference):
    case, denoiser = reference.case("B.sampling"), reference.network("esolm")
    assert torch.equal(case["x0"].gather(1, case["order"]), case["tokens_sorted"])
    texts = len(case["order"])
    for which in [slice(text, text + 1) for text in range(texts)] + [slice(0, texts)]:  # alone, then all together
        order, tokens = case["order"][which], case["tokens_sorted"][which]
        assert_logits(
            (lambda n, o=order, t=tokens: forced(n, o, t, reference), denoiser), case["logits"][which, :, :-1]
        )


@pytest.mark.parametrize("kind", [Inference, Engine], ids=["torch", "compiled"])
def test_cached_sampling_by_the_networks_that_only_write(reference, kind):
    if kind is Engine and native.library() is None:
        pytest.skip("no C compiler is here")
    case, denoiser = reference.case("B.sampling"), reference.network("esolm")

    def follow(network):
        network = kind(network, "float32") if network is denoiser else network  # else the denoiser in float64
        return forced(network, case["order"], case["tokens_sorted"], reference)

    assert_logits((follow, denoiser), case["logits"][..., :-1])


@torch.inference_mode()
def forced(denoiser, order, tokens, reference):
    """Logits of a writer whose steps are decided by the case, in rank order."""
    widths = tuple(reference.sizes["B.sampling.schedule"])
    requests = [Request(length=order.shape[1], seed=seed) for seed in range(len(order))]
    algorithm = Scripted(orders=order.tolist(), widths=widths)
    writer, steps = Writer(denoiser, algorithm, requests), []
    while writer.active:
        hidden, text, rank = writer.evaluate()
        logits = denoiser.logits(hidden)[:, :-1]
        steps.append(logits.view(len(order), widths[len(steps)], -1))
        writer.accept(text, rank, tokens.numpy()[text, rank])
    return torch.cat(steps, dim=1)


@dataclass(frozen=True, kw_only=True)
class Scripted(EsoLM):
    """Eso-LM (B) that writes in given orders by given widths, every step of the diffusion kind."""

    orders: list
    widths: tuple

    def plan(self, request, rng):
        stop = np.cumsum(self.widths)
        start = stop - np.array(self.widths)
        return replace(
            super().plan(request, rng),
            order=np.array(self.orders[request.seed]),
            closed=start,
            start=start,
            stop=stop,
            shown=stop,
            sequential=np.zeros(len(stop), dtype=bool),
        )


def test_mdlm_logits_and_losses(reference):
    case, denoiser, mask_id = reference.case("mdlm"), reference.network("mdlm"), reference.mask_id
    t = case["t"].double()
    assert_close(LogLinear().alpha(t), case["alpha_t"], 1e-6)
    view = MDLM().view_of(Batch.of(case["x0"]), case["zt"] != mask_id, t[:, None], mask_id)
    assert_logits(logits_of(view, denoiser), case["logits"][..., :-1])
    assert_losses(view, denoiser, case["nll_elbo"])


def test_ar_logits_and_losses(reference):
    case, denoiser = reference.case("ar"), reference.network("ar")
    order = torch.arange(case["x0"].shape[1]).expand_as(case["x0"])
    view = AR().exact(Batch.of(case["x0"]), order, reference.mask_id)
    assert torch.equal(view.tokens, case["input"])
    assert_logits(logits_of(view, denoiser), case["logits"][..., :-1])
    assert_losses(view, denoiser, case["nll"])


def test_bd3lm_logits_and_losses(reference):
    tensors, denoiser, mask_id = reference.tensors("bd3lm.cases"), reference.network("bd3lm"), reference.mask_id
    for size in sorted({int(key.split(".")[0].removeprefix("block")) for key in tensors if key != "x0"}):
        case = reference.case(f"block{size}", "bd3lm.cases")
        clean, probability = case["zt"] != mask_id, case["mask_prob"].double()
        view = BD3LM(block_size=size).view_of(Batch.of(case["x0"]), clean, probability, mask_id)
        z = slice(clean.shape[1])
        assert_logits(logits_of(view, denoiser, z), case["logits"][..., :-1])
        assert_losses(view, denoiser, case["nll_weighted"], z)


def test_folding_the_time_conditioning_is_exact(reference):
    """Our norm and gate equal adaLN in float64 to the rounding of the stored weights."""
    tensors = reference.tensors("esolm.weights")
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


def test_the_training_file_holds_the_networks_averaged_weights(reference, tmp_path):
    if TRAINED not in reference.files:
        pytest.skip(f"NOT COMPARED: there is no {reference.name}.{TRAINED} in {FOLDER}")
    file = FOLDER / f"{reference.name}.{TRAINED}"
    mean, raw = (import_model(file, tmp_path / kind, weights=kind) for kind in ("ema", "raw"))
    denoiser = reference.network("esolm")
    assert mean.network == raw.network == denoiser.config
    assert mean.algorithm == raw.algorithm
    assert mean.algorithm.alpha_0 == reference.algorithm(mean.algorithm.variant).alpha_0
    expected, ours, last = denoiser.state_dict(), checkpoint.load(mean.path).model, checkpoint.load(raw.path).model
    assert ours.keys() == last.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not all(torch.equal(last[name], expected[name]) for name in expected)


def test_epsilon_is_the_authors(reference):
    told = {key: value for key, value in reference.sizes.items() if key.endswith("alpha_0")}
    if "dalpha_dt" not in reference.sizes:
        pytest.skip(f"NOT COMPARED: {reference.name}.json has no dalpha_dt")
    derivatives = [LogLinear(alpha_0=alpha_0).derivative for alpha_0 in told.values()]
    assert pytest.approx(reference.sizes["dalpha_dt"], rel=1e-9, abs=1e-12) in derivatives
    assert EPSILON == 1e-3


def test_log_probabilities_leave_the_mask_out(reference):
    case = reference.case("ar")
    nll = -log_probabilities(case["logits"]).gather(-1, case["x0"][..., None])[..., 0]
    assert_close(nll, case["nll"])
