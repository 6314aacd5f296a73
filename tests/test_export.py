"""One step as a program of torch: saved, loaded back, and equal to the network at other sizes than it was made with."""

import itertools

import pytest
import torch

import esolm
from esolm import cli
from esolm.attention import Relation, attends
from esolm.denoiser import Config, Denoiser
from esolm.export import Step, exported
from esolm.plain import FileError
from test_hub_models import saved

SHAPES = {
    "plain": {},
    "qwen": {"gated": True, "rms_norm": True, "kv_heads": 2, "qk_norm": True, "head_dim": 32, "rotary_base": 1e6},
}


@pytest.fixture(scope="module", params=SHAPES)
def network(request) -> Denoiser:
    config = Config(vocab_size=50, length=64, width=32, layers=2, heads=4, **SHAPES[request.param])
    return Denoiser(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def program(network, tmp_path_factory):
    """The program, after it went through a file."""
    path = tmp_path_factory.mktemp("program") / "step.pt2"
    torch.export.save(exported(network), path)
    return torch.export.load(path).module()


def inputs(network, batch: int, rows: int, cached: int) -> tuple[torch.Tensor, ...]:
    config, generator = network.config, torch.Generator().manual_seed(rows + 10 * cached)
    reads = torch.rand(batch, 1, rows, cached + rows, generator=generator) < 0.5
    reads[..., cached:] |= torch.eye(rows, dtype=torch.bool)
    shape = (config.layers, batch, config.num_kv_heads, cached, config.dim)
    return (
        torch.randint(0, config.vocab_size, (batch, rows), generator=generator),
        torch.randint(0, config.length, (batch, rows), generator=generator),
        reads,
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )


@pytest.mark.parametrize(("batch", "rows", "cached"), list(itertools.product((1, 4), (2, 3, 17), (0, 1, 40))))
def test_the_program_is_the_network_at_every_size(network, program, batch, rows, cached):
    given = inputs(network, batch, rows, cached)
    with torch.no_grad():
        for found, right in zip(program(*given), Step(network)(*given), strict=True):
            assert found.shape == right.shape and torch.allclose(found, right, atol=1e-5)


def test_a_text_written_in_steps_has_the_logits_of_the_whole(network, program):
    """Keys and values that come out go in again: three passes against one, by the network's own cache-free pass."""
    tokens = torch.randint(0, 49, (2, 10), generator=torch.Generator().manual_seed(1))
    positions = torch.stack((torch.arange(10), torch.arange(10).flip(0) + 3))
    stage, public = torch.arange(10).expand(2, -1), torch.ones(2, 10, dtype=torch.bool)
    config, found = network.config, []
    keys = values = torch.zeros(config.layers, 2, config.num_kv_heads, 0, config.dim)
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 6), slice(6, 10)):
            reads = attends(stage[:, part], public[:, part], stage[:, : part.stop], public[:, : part.stop])[:, None]
            out, k, v = program(tokens[:, part], positions[:, part], reads, keys, values)
            keys, values = torch.cat((keys, k), 3), torch.cat((values, v), 3)
            found.append(out)
        whole = network.logits(network(tokens, positions, Relation(causal=True)))
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-5)


def test_the_command_writes_a_program_of_the_averaged_weights(tmp_path, capsys):
    step, out = saved(tmp_path / "run"), tmp_path / "step.pt2"
    network = esolm.load(step, dtype="float32").denoiser
    cli.main(["export", str(step), "--out", str(out)])
    assert "in float32" in capsys.readouterr().err
    rows = torch.arange(12)[None]
    nothing = torch.zeros(1, 1, 2, 0, 8)
    reads = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found, *_ = torch.export.load(out).module()(rows, rows, reads, nothing, nothing.clone())
        right = network.logits(network(rows, rows, Relation(causal=True)))
    assert torch.allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("name", ["step.pt2", "absent/step.pt2"])
def test_a_file_in_the_way_or_a_folder_that_is_not_there_is_told(tmp_path, name):
    from esolm.export import export

    (tmp_path / "step.pt2").write_text("mine")
    with pytest.raises(FileError, match=r"exists already|there is no folder"):
        export(saved(tmp_path / "run"), tmp_path / name)
    assert (tmp_path / "step.pt2").read_text() == "mine"
