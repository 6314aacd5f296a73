"""The authors' network written out, time conditioning and all, against ours after import.

h + gate * f(norm(h) * (1 + scale) + shift),   (shift, scale, gate) = adaLN(time zero)
"""

import math

import pytest
import torch
import torch.nn.functional as F

from esolm.attention import Relation
from esolm.denoiser import Denoiser
from esolm.importers import from_authors

VOCAB, WIDTH, HEADS, LAYERS, LENGTH, CONDITION = 7, 8, 2, 3, 5, 6


def theirs(conditioned: bool) -> dict[str, torch.Tensor]:
    """Random weights under the authors' names, all of them far from zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    weights = {
        "vocab_embed.embedding": random(VOCAB, WIDTH),
        "rotary_emb.inv_freq": 1 / 10_000 ** (torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)),
        "output_layer.norm_final.weight": 1 + random(WIDTH),
        "output_layer.linear.weight": random(VOCAB, WIDTH),
        "output_layer.linear.bias": random(VOCAB),
    }
    for layer in range(LAYERS):
        shapes = {
            "norm1.weight": (WIDTH,),
            "attn_qkv.weight": (3 * WIDTH, WIDTH),
            "attn_out.weight": (WIDTH, WIDTH),
            "norm2.weight": (WIDTH,),
            "mlp.0.weight": (3 * WIDTH, WIDTH),
            "mlp.0.bias": (3 * WIDTH,),
            "mlp.2.weight": (WIDTH, 3 * WIDTH),
            "mlp.2.bias": (WIDTH,),
        }
        weights |= {f"blocks.{layer}.{name}": random(*shape) for name, shape in shapes.items()}
    if conditioned:
        weights |= {"sigma_map.mlp.0.weight": random(CONDITION, 256), "sigma_map.mlp.0.bias": random(CONDITION)}
        weights |= {"sigma_map.mlp.2.weight": random(CONDITION, CONDITION), "sigma_map.mlp.2.bias": random(CONDITION)}
        parts = {f"blocks.{layer}": 6 for layer in range(LAYERS)} | {"output_layer": 2}
        for name, count in parts.items():
            weights[f"{name}.adaLN_modulation.weight"] = random(count * WIDTH, CONDITION)
            weights[f"{name}.adaLN_modulation.bias"] = random(count * WIDTH)
    return weights


def their_logits(source: dict[str, torch.Tensor], tokens: torch.Tensor, conditioned: bool) -> torch.Tensor:
    """Their forward pass in float64, every row reading every row."""
    w = {name: tensor.double() for name, tensor in source.items()}
    time = torch.cat((torch.ones(128), torch.zeros(128))).double()
    hidden = F.silu(w["sigma_map.mlp.0.weight"] @ time + w["sigma_map.mlp.0.bias"]) if conditioned else None
    condition = F.silu(w["sigma_map.mlp.2.weight"] @ hidden + w["sigma_map.mlp.2.bias"]) if conditioned else None

    def modulation(name: str, count: int) -> list[torch.Tensor]:
        if not conditioned:
            return [torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double(), torch.ones(WIDTH).double()] * 2
        weight, bias = w[f"{name}.adaLN_modulation.weight"], w[f"{name}.adaLN_modulation.bias"]
        return list((weight @ condition + bias).chunk(count))

    def normed(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight) * (1 + scale) + shift

    angle = torch.outer(torch.arange(tokens.shape[1]).double(), w["rotary_emb.inv_freq"])
    h = w["vocab_embed.embedding"][tokens]
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(at, 6)
        qkv = normed(h, w[f"{at}.norm1.weight"], shift1, scale1) @ w[f"{at}.attn_qkv.weight"].T
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (turned(x, angle) for x in (q, k))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + gate1 * (mixed.transpose(1, 2).flatten(2) @ w[f"{at}.attn_out.weight"].T)
        inner = F.linear(
            normed(h, w[f"{at}.norm2.weight"], shift2, scale2), w[f"{at}.mlp.0.weight"], w[f"{at}.mlp.0.bias"]
        )
        h = h + gate2 * F.linear(F.gelu(inner, approximate="tanh"), w[f"{at}.mlp.2.weight"], w[f"{at}.mlp.2.bias"])
    shift, scale = modulation("output_layer", 2)[:2]
    last = normed(h, w["output_layer.norm_final.weight"], shift, scale)
    return F.linear(last, w["output_layer.linear.weight"], w["output_layer.linear.bias"])


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [True, False])
def test_folding_the_time_conditioning_changes_no_logit(conditioned):
    source = theirs(conditioned)
    config, weights = from_authors(source, LENGTH)
    assert (config.width, config.layers, config.heads, config.hidden_mlp) == (WIDTH, LAYERS, HEADS, 3 * WIDTH)
    denoiser = Denoiser(config).eval()
    denoiser.load_state_dict(weights)
    tokens = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    ours = denoiser.logits(denoiser(tokens, torch.arange(LENGTH).expand_as(tokens), Relation()))
    expected = their_logits(source, tokens, conditioned)
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("missing", ["vocab_embed.embedding", "rotary_emb.inv_freq", "blocks.1.norm1.weight"])
def test_weights_of_another_kind_are_refused_by_the_name_that_they_lack(missing):
    source = theirs(True)
    del source[missing]
    with pytest.raises(ValueError, match=f"no tensor '{missing}'"):
        from_authors(source, LENGTH)


def test_frequencies_of_another_base_are_refused():
    """Only `inv_freq` tells the base: any other, taken for 10,000, would turn every row by a wrong angle in silence."""
    source = theirs(True)
    dim = WIDTH // HEADS
    source["rotary_emb.inv_freq"] = 1 / 500_000 ** (torch.arange(0, dim, 2) / dim)
    with pytest.raises(ValueError, match="not those of base 10000"):
        from_authors(source, LENGTH)


def test_weights_are_folded_in_float64_and_rounded_once():
    source = theirs(True)
    _, weights = from_authors(source, LENGTH)
    w = {name: tensor.double() for name, tensor in source.items()}
    time = torch.cat((torch.ones(128), torch.zeros(128))).double()
    hidden = F.silu(w["sigma_map.mlp.0.weight"] @ time + w["sigma_map.mlp.0.bias"])
    condition = F.silu(w["sigma_map.mlp.2.weight"] @ hidden + w["sigma_map.mlp.2.bias"])
    ada = w["blocks.2.adaLN_modulation.weight"] @ condition + w["blocks.2.adaLN_modulation.bias"]
    exact = w["blocks.2.mlp.2.weight"] * ada.chunk(6)[5][:, None]
    assert torch.equal(weights["blocks.2.down.weight"], exact.float())
