"""The network as it writes is the denoiser: the same logits in every shape of network, near ones in smaller dtypes."""

import pytest
import torch

from esolm.attention import Relation, attends, relation
from esolm.denoiser import Config, Denoiser
from esolm.inference import Inference, describe, prepared
from esolm.products import chosen, half_runs

SIZES = {"vocab_size": 50, "length": 24, "width": 64, "layers": 2, "heads": 4}
SHAPES = {
    "plain": {},
    "biases": {"norm_bias": True, "qkv_bias": True, "out_bias": True},
    "llama": {"gated": True, "rms_norm": True, "kv_heads": 2, "mlp_bias": False, "head_bias": False},
    "qwen": {"gated": True, "rms_norm": True, "kv_heads": 2, "qk_norm": True, "head_dim": 32, "rotary_base": 1e6},
}
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def denoiser(**options) -> Denoiser:
    """A network with large weights, biases and norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    network = Denoiser(Config(**SIZES | options), generator).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim == 1 else 0.1))
    return network


def logits(network, *, cached: bool) -> torch.Tensor:
    """Of ten rows of two texts, fed at once or in three passes over a cache."""
    tokens = torch.randint(0, 49, (2, 10), generator=torch.Generator().manual_seed(1))
    positions = torch.stack((torch.arange(10), torch.arange(10).flip(0) + 3))
    stage, public = torch.arange(10).expand(2, -1), torch.ones(2, 10, dtype=torch.bool)
    with torch.inference_mode():
        if not cached:
            return network.logits(network(tokens, positions, relation(stage, public)))
        cache, found = network.cache(2, 10), []
        for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
            rows = tokens[:, part]
            cache.place(rows.shape[1])
            mask = attends(stage[:, part], public[:, part], stage[:, : part.stop], public[:, : part.stop])
            found.append(network.logits(network(rows, positions[:, part], Relation(mask=mask[:, None]), cache)))
            cache.truncate(cache.lengths + rows.shape[1])
        return torch.cat(found, dim=1)


@each_shape
@pytest.mark.parametrize("cached", [False, True], ids=["at once", "cached"])
def test_the_network_that_writes_gives_the_denoisers_logits(shape, cached):
    network = denoiser(**SHAPES[shape])
    assert torch.allclose(logits(prepared(network, "float32"), cached=cached), logits(network, cached=False), atol=1e-5)


@each_shape
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_weights_give_near_logits(shape, dtype):
    if dtype == "float16" and not half_runs():
        pytest.skip("this torch has no product with float16 weights")
    network = denoiser(**SHAPES[shape])
    exact, near = logits(network, cached=False), logits(prepared(network, dtype), cached=True)
    assert 0 < (near - exact).std() / exact.std() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_the_same_bits_whatever_other_rows_there_are(dtype):
    """Each product at every number of rows; the sampler's own test is in test_sampling.py."""
    if dtype == "float16" and not half_runs():
        pytest.skip("this torch has no product with float16 weights")
    for product in prepared(denoiser(width=96, mlp_width=200), dtype).products:
        x = torch.randn(40, product.inputs, generator=torch.Generator().manual_seed(2))
        whole = product(x)
        for rows in (1, 2, 3, 7, 16, 33):
            assert torch.equal(product(x[:rows]), whole[:rows]), (product.kind, rows)
            assert torch.equal(product(x[None, :rows])[0], whole[:rows])


def test_one_row_without_a_batch_is_a_row():
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        if dtype != "float16" or half_runs():
            product = prepared(denoiser(), dtype).products[0]
            assert product(torch.ones(product.inputs)).shape == (product.outputs,)


def test_what_was_made_from_a_denoiser_does_not_follow_it():
    network = denoiser()
    copy = prepared(network, "float32")
    before = logits(copy, cached=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(logits(copy, cached=False), before)


def test_weights_too_large_for_float16_stay_float32():
    network = denoiser()
    with torch.no_grad():
        network.head.weight[0, 0] = 1e6
    kinds = [product.kind for product in prepared(network, "float16").products]
    assert kinds[-1].endswith("float32") and kinds[0].endswith("float16" if half_runs() else "float32")


def test_it_tells_what_its_products_read():
    network = prepared(denoiser(), "int8")
    assert isinstance(network, Inference)
    assert sum(product.nbytes for product in network.products) == sum(
        product.inputs * product.outputs for product in network.products
    )
    assert describe(network).startswith(f"{len(network.products)} packed int8, ")


def test_auto_is_float16_at_a_few_rows_and_never_int8():
    for rows in (1, 2, 1000):
        found = chosen("auto", torch.device("cpu"), rows)
        assert found != "int8"
        assert rows > 2 or found == "float16" or not half_runs()


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_dtype_that_a_device_lacks_is_refused(dtype):
    with pytest.raises(ValueError, match="run on a CPU only"):
        chosen(dtype, torch.device("cuda"))
