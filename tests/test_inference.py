"""The network as it writes is the denoiser: the same logits in every shape of network, near ones in smaller dtypes."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from esolm import calibrate, draw, native, products
from esolm.attention import Relation, attends, relation
from esolm.denoiser import Config, Denoiser
from esolm.engine import Engine
from esolm.inference import Inference, compiled, describe, prepared
from esolm.products import Chosen, chosen, half_runs, packed

SIZES = {"vocab_size": 50, "length": 24, "width": 64, "layers": 2, "heads": 4}
SHAPES = {
    "plain": {},
    "biases": {"norm_bias": True, "qkv_bias": True, "out_bias": True},
    "llama": {"gated": True, "rms_norm": True, "kv_heads": 2, "mlp_bias": False, "head_bias": False},
    "qwen": {"gated": True, "rms_norm": True, "kv_heads": 2, "qk_norm": True, "head_dim": 32, "rotary_base": 1e6},
}
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_kind = pytest.mark.parametrize("kind", [Inference, Engine], ids=["torch", "compiled"])


def made(kind: type[Inference | Engine], network: Denoiser, dtype: Chosen) -> Inference | Engine:
    """A network that writes; the test is skipped where there is none of this kind."""
    if kind is Engine and native.library() is None:
        pytest.skip("no C compiler is here")
    if kind is Inference and dtype == "float16" and not half_runs():
        pytest.skip("this torch has no product with float16 weights")
    return kind(network, dtype)


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


@each_kind
@each_shape
@pytest.mark.parametrize("cached", [False, True], ids=["at once", "cached"])
def test_the_network_that_writes_gives_the_denoisers_logits(kind, shape, cached):
    network = denoiser(**SHAPES[shape])
    found = logits(made(kind, network, "float32"), cached=cached)
    assert torch.allclose(found, logits(network, cached=False), atol=1e-5)


@each_kind
@each_shape
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_weights_give_near_logits(kind, shape, dtype):
    network = denoiser(**SHAPES[shape])
    exact, near = logits(network, cached=False), logits(made(kind, network, dtype), cached=True)
    assert 0 < (near - exact).std() / exact.std() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [96, 264])
def test_a_row_of_the_compiled_network_has_the_same_bits_in_any_company(dtype, width):
    check_company(made(Engine, denoiser(width=width, mlp_width=201, length=64), dtype))


def check_company(network: Engine) -> None:
    """A row alone, among others of its text, among other texts of more and of fewer rows, wanted with others and
    without, with one thread and with two."""
    tokens = torch.randint(0, 49, (3, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).expand(3, -1)
    causal = np.tri(40, dtype=bool)

    def hidden(text: slice, rows: int) -> torch.Tensor:
        who = Relation(mask=torch.from_numpy(causal[:rows, :rows]).expand(len(tokens[text]), 1, -1, -1))
        return network(tokens[text, :rows], positions[text, :rows], who)

    def ragged(counts: list[int], first: int = 0) -> torch.Tensor:
        """Of texts with so many rows, those from `first` on."""
        real = np.arange(40) < np.array(counts)[:, None]
        passes = network.passes(
            network.cache(3, 40),
            positions=positions.numpy()[None],
            real=real[None],
            wanted=(real & (np.arange(40) >= first))[None],
            mask=np.broadcast_to(causal, (1, 3, 40, 40)),
            kept=np.zeros((1, 3), dtype=np.int64),
        )
        return passes.hidden(0, tokens.numpy())

    whole = hidden(slice(0, 3), 40)
    assert torch.equal(network.logits(whole)[1, 7:8], network.logits(whole[1, 7:8]))
    for rows in (1, 2, 3, 4, 7, 16, 33):
        assert torch.equal(hidden(slice(1, 2), rows)[0], whole[1, :rows])
        assert torch.equal(ragged([5, rows, 40]), torch.cat((whole[0, :5], whole[1, :rows], whole[2])))
        assert torch.equal(ragged([5, rows, 40], first=3), torch.cat((whole[0, 3:5], whole[1, 3:rows], whole[2, 3:])))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(hidden(slice(0, 3), 40), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("flag", "lanes"), [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_narrower_vectors_give_the_same_network(flag, lanes, monkeypatch, tmp_path):
    """Processors without AVX-512, and without AVX, as far as this one can tell."""
    if native.library() is None or native.library().lanes <= lanes:
        pytest.skip("no wider vectors are here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "narrow").write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" {flag}\n')
    (tmp_path / "narrow").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "narrow"))
    native.found.cache_clear()
    try:
        assert native.library().lanes == lanes
        network = denoiser(width=96, mlp_width=201, length=64)
        for dtype, tolerance in TOLERANCES.items():
            engine = Engine(network, dtype)
            exact, near = logits(network, cached=False), logits(engine, cached=True)
            assert (near - exact).std() / exact.std() < tolerance, dtype
            check_company(engine)
    finally:
        monkeypatch.undo()
        native.found.cache_clear()


def test_a_cache_that_is_too_small_is_refused():
    network = made(Engine, denoiser(), "float32")
    one, mask = np.ones((1, 1, 17), dtype=bool), np.ones((1, 1, 17, 517), dtype=bool)
    rows = {"positions": np.zeros(one.shape, dtype=np.int64), "real": one, "wanted": one, "mask": mask}
    with pytest.raises(ValueError, match=r"the cache holds \d+ rows, 517 are needed"):
        network.passes(network.cache(1, 17), kept=np.full((1, 1), 500), **rows)


def test_a_cache_of_another_network_is_refused():
    network = made(Engine, denoiser(), "float16")
    assert network.cache(1, 3).keys[0].dtype == torch.float16
    rows = torch.zeros(1, 2, dtype=torch.int64)
    for other in (denoiser(), made(Engine, denoiser(), "float32")):
        cache = other.cache(1, 3)
        cache.place(2)
        with pytest.raises(ValueError, match="made for another network"):
            network(rows, rows, Relation(), cache)


def test_the_compiled_network_reads_no_memory_that_is_not_its_own():
    network = made(Engine, denoiser(), "float32")
    rows = torch.zeros(1, 2, dtype=torch.int64)
    for tokens, positions in ((rows + 50, rows), (rows - 1, rows), (rows, rows + 24)):
        with pytest.raises(IndexError, match="must lie in"):
            network(tokens, positions, Relation())


def test_the_compiled_draw_is_the_draw():
    """The same ids for the same numbers, but where rounding moves a boundary; and exact at both ends."""
    network = made(Engine, denoiser(vocab_size=1300, width=32, heads=2), "float32")
    generator = torch.Generator().manual_seed(4)
    hidden = 3 * torch.randn(400, 32, generator=generator)
    uniform = torch.rand(400, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    for temperature in (1.0, 0.3):
        logits = network.logits(hidden).clone()
        logits[:, -1] = -torch.inf
        expected = draw.draw(logits, uniform, draw.Draw(temperature=temperature)).numpy()
        found = network.draw(hidden, uniform.numpy(), temperature)
        assert (found == expected).mean() > 0.99 and (found < 1299).all()
        assert np.abs(found - expected).max() <= 2  # a boundary between neighbours
    hidden[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        network.draw(hidden, uniform.numpy())


UNDER_ANOTHER_DEFAULT = """
import sys
import torch
from esolm.algorithms import EsoLM
from esolm.denoiser import Config, Denoiser
from esolm.model import Model
from esolm.tokenizer import Tokenizer

def model_of(dtype):
    network = Denoiser(Config(vocab_size=258, length=64, width=64, layers=2, heads=2), torch.Generator().manual_seed(0))
    return Model(network, EsoLM(), Tokenizer.bytes(), dtype=dtype)

first = model_of("float32")
text, score = first.sample(seed=1), first.score("abc")
if sys.argv[1] == "meta":
    torch.set_default_device("meta")
    assert first.sample(seed=1) == text
else:
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
    assert first.sample(2, seed=1)[:1] == text and first.score("abc") == score
    for dtype in ("float32", "float16", "int8"):
        assert model_of(dtype).sample(seed=1)
"""


@pytest.mark.parametrize("default", ["bfloat16", "float64", "meta"])
@pytest.mark.parametrize("engine", ["", "0"], ids=["compiled", "torch"])
def test_what_torch_makes_by_default_is_the_users_and_changes_nothing(default, engine):
    """The engine's buffers had torch's default dtype: with bfloat16 they were half as long, and C wrote behind them."""
    command = [sys.executable, "-c", UNDER_ANOTHER_DEFAULT, default]
    subprocess.run(command, check=True, env={**os.environ, "ESOLM_NATIVE": engine})


REASONS = {
    "off": "ESOLM_NATIVE=0",
    "no compiler": "there is no C compiler",
    "broken compiler": r"cc failed \(error: no such machine\)",
    "wrong numbers": "gives other numbers",
}


@pytest.mark.parametrize("problem", REASONS)
def test_without_a_compiled_network_torch_writes_and_says_why(problem, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ESOLM_NATIVE", raising=False)
    if problem == "off":
        monkeypatch.setenv("ESOLM_NATIVE", "0")
    elif problem == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
    elif problem == "broken compiler":
        (tmp_path / "cc").write_text("#!/bin/sh\necho 'a word' >&2\necho 'error: no such machine' >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    else:
        monkeypatch.setattr(Engine, "logits", lambda network, hidden: torch.zeros(*hidden.shape[:-1], 40))
    native.found.cache_clear()
    compiled.cache_clear()
    try:
        if problem == "wrong numbers" and native.library() is None:
            pytest.skip("no C compiler is here")
        with caplog.at_level("INFO", "esolm.native"):
            found = [prepared(denoiser(), "float32") for _ in range(2)]
        assert all(isinstance(network, Inference) and re.search(REASONS[problem], network.lacking) for network in found)
        assert prepared(denoiser(), "float32", rows=100).lacking == ""
        told = [line for line in caplog.messages if line.startswith("no compiled engine")]
        assert len(told) == (problem in ("no compiler", "broken compiler"))
    finally:
        monkeypatch.undo()
        native.found.cache_clear()
        compiled.cache_clear()


def test_the_library_is_compiled_once_and_kept_where_nobody_else_writes(monkeypatch, tmp_path, caplog):
    if native.library() is None:
        pytest.skip("no C compiler is here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.found.cache_clear()
    try:
        with caplog.at_level("INFO", "esolm.native"):
            assert native.library() is not None
        (made_here,) = (tmp_path / "esolm" / "native").iterdir()
        before = made_here.stat().st_mtime_ns
        native.found.cache_clear()
        with caplog.at_level("INFO", "esolm.native"):
            assert native.library() is not None and made_here.stat().st_mtime_ns == before
        assert [line.split()[0] for line in caplog.messages] == ["compiling"]  # told once
        made_here.parent.chmod(0o777)
        made_here.unlink()  # not written over: this process has it mapped, and would end with a bus error
        made_here.write_bytes(b"not ours")
        native.found.cache_clear()
        assert native.library() is not None and made_here.read_bytes() == b"not ours"
    finally:
        monkeypatch.undo()
        native.found.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_the_same_bits_whatever_other_rows_there_are(dtype):
    """Each of torch's products at every number of rows; the sampler's own test is in test_sampling.py."""
    if dtype == "float16" and "AVX512" not in calibrate.capability():
        pytest.skip("torch's product with float16 weights rounds by the number of rows on CPUs without AVX-512")
    for product in made(Inference, denoiser(width=96, mlp_width=200), dtype).products:
        x = torch.randn(40, product.inputs, generator=torch.Generator().manual_seed(2))
        whole = product(x)
        for rows in (1, 2, 3, 7, 16, 33):
            assert torch.equal(product(x[:rows]), whole[:rows]), (product.kind, rows)
            assert torch.equal(product(x[None, :rows])[0], whole[:rows])


def test_one_row_without_a_batch_is_a_row():
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        if dtype != "float16" or half_runs():
            product = packed(denoiser().head, dtype)
            assert product(torch.ones(product.inputs)).shape == (product.outputs,)


@each_kind
def test_what_was_made_from_a_denoiser_does_not_follow_it(kind):
    network = denoiser()
    copy = made(kind, network, "float32")
    before = logits(copy, cached=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(logits(copy, cached=False), before)


@each_kind
def test_weights_too_large_for_float16_stay_float32(kind):
    network = denoiser()
    with torch.no_grad():
        network.head.weight[0, 0] = 1e6
    kinds = [product.kind for product in made(kind, network, "float16").products]
    assert kinds[-1].endswith("float32") and kinds[0].endswith("float16")


@each_kind
def test_it_tells_what_its_products_read(kind):
    network = made(kind, denoiser(), "int8")
    assert sum(product.nbytes for product in network.products) == sum(
        product.inputs * product.outputs for product in network.products
    )
    assert describe(network).startswith(f"{len(network.products)} {network.products[0].kind}, ")


def test_weights_of_the_compiled_network_lie_in_the_order_in_which_they_are_read():
    """Without gaps: what is asked for ahead of one product's end is the next one's beginning."""
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        weights = [product.weight for product in made(Engine, denoiser(mlp_width=201), dtype).products]
        for one, following in itertools.pairwise(weights):
            assert one.data_ptr() % 64 == 0
            assert 0 <= following.data_ptr() - one.data_ptr() - one.nbytes < 64


def test_float16_that_torch_lacks_is_the_compiled_networks_alone(monkeypatch):
    monkeypatch.setattr(products, "half_runs", lambda: False)
    cpu = torch.device("cpu")
    assert chosen("float16", cpu, engine=True) == "float16"
    with pytest.raises(ValueError, match="no product with float16 weights"):
        chosen("float16", cpu)
    assert made(Engine, denoiser(), "float16").products[0].dtype == "float16"


def test_auto_is_float16_at_a_few_rows_and_never_int8():
    for rows in (1, 2, 1000):
        found = chosen("auto", torch.device("cpu"), rows)
        assert found != "int8"
        assert rows > 2 or found == "float16" or not half_runs()


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_dtype_that_a_device_lacks_is_refused(dtype):
    with pytest.raises(ValueError, match="run on a CPU only"):
        chosen(dtype, torch.device("cuda"))
