"""The optimizer: rates as drawn, state exact to the bit, and bad gradients found before the update."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from esolm.optim import Config, NotFinite, Optimizer, Schedule, WeightAverage

rates = st.builds(
    Schedule,
    peak=st.floats(1e-6, 1.0),
    warmup=st.integers(0, 200) | st.floats(0, 0.99),
    decay=st.sampled_from(["cosine", "linear"]),
    final=st.floats(0, 1),
)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 5)).to(dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range, average: WeightAverage | None = None) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(7, (6,), generator=generator)
        loss = model(tokens).square().mean() + model[2].weight.sum()
        loss.backward()
        optimizer.clip()
        optimizer.update(optimizer.config.schedule.rate(step, 20))
        if average is not None:
            average.update(step + 1)
        losses.append(loss.item())
    return losses


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return load(save({name: tensor.clone() for name, tensor in tensors.items()}))


@given(rates, st.integers(1, 500))
def test_a_rate_is_positive_until_the_end_and_never_above_the_peak(schedule: Schedule, total: int) -> None:
    values = [schedule.rate(step, total) for step in range(total)]
    assert all(0 <= value <= schedule.peak * (1 + 1e-12) for value in values)
    assert all(value > 0 for value in values[:-1])


@given(rates)
def test_a_rate_rises_through_the_warm_up_and_then_falls_to_its_final_share(schedule: Schedule) -> None:
    total = 300
    values = [schedule.rate(step, total) for step in range(total)]
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert math.isclose(values[-1], schedule.peak * schedule.final, abs_tol=1e-12)


def test_the_rate_of_the_paper_is_constant_after_2500_steps() -> None:
    schedule = Schedule()
    assert schedule.rate(0, 250_000) == pytest.approx(3e-4 / 2500)
    assert schedule.rate(1249, 250_000) == pytest.approx(1.5e-4)
    assert schedule.rate(2499, 250_000) == schedule.rate(249_999, 250_000) == 3e-4


@pytest.mark.parametrize(
    ("option", "value"),
    [("peak", 0.0), ("peak", float("nan")), ("warmup", -1), ("final", 2.0), ("final", 0.1)],
)
def test_a_schedule_that_means_nothing_is_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Schedule(**{option: value})


def test_all_problems_of_the_configuration_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"beta 2.*average.*epsilon.*weight_decay.*clip"):
        Config(betas=(0.9, 1.0), average=1.5, epsilon=0.0, weight_decay=-1.0, clip=0.0)


def test_an_update_equals_torchs_own_adamw() -> None:
    ours, theirs = network(), network()
    config = Config(weight_decay=0.1, clip=0.5, schedule=Schedule(peak=0.01, warmup=5))
    optimizer = Optimizer(ours, config)
    plain = [theirs[0].weight, theirs[1].weight, theirs[1].bias, theirs[2].bias]
    groups = [{"params": [theirs[2].weight], "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, foreach=False)
    for step in range(10):
        for model in (ours, theirs):
            model(torch.arange(7)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert optimizer.clip() == pytest.approx(float(norm), rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = config.schedule.rate(step, 100)
        reference.step()
        reference.zero_grad()
        optimizer.update(config.schedule.rate(step, 100))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(258,), (5, 7), (64, 24)])
def test_parts_of_a_parameter_are_updated_as_the_whole_to_the_bit(shape: tuple[int, ...]) -> None:
    """The kernel rounds the last numbers of a tensor otherwise, and a shard has other last ones."""
    random = torch.Generator().manual_seed(0)
    first, gradients = torch.randn(shape, generator=random), torch.randn(5, *shape, generator=random)

    def updated(rows: slice) -> list[Tensor]:
        model = nn.ParameterDict({"weight": nn.Parameter(first[rows].clone())})
        optimizer = Optimizer(model, Config(schedule=Schedule(warmup=1)))
        for gradient in gradients:
            model["weight"].grad = gradient[rows].clone()
            optimizer.update(3e-3)
        state = optimizer.state()
        return [model["weight"].detach(), state["exp_avg.weight"], state["exp_avg_sq.weight"]]

    whole = updated(slice(None))
    for size in (2, 3, 4, 64):
        each = -(-shape[0] // size)
        parts = [updated(slice(begin, begin + each)) for begin in range(0, shape[0], each)]
        assert all(torch.equal(torch.cat(found), of_all) for *found, of_all in zip(*parts, whole, strict=True))


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, Config(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.update(0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"2.weight"}


def test_a_clipped_gradient_has_the_norm_asked_for() -> None:
    model = network()
    optimizer = Optimizer(model, Config(clip=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert optimizer.clip() == pytest.approx(3.0 * math.sqrt(sum(p.numel() for p in model.parameters())))
    assert optimizer.clip() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_a_gradient_that_is_not_finite_is_named_before_anything_changes(value: float, word: str) -> None:
    model = network()
    optimizer = Optimizer(model, Config())
    model(torch.arange(7)).sum().backward()
    model[1].bias.grad[2] = value
    model[2].bias.grad[0] = value
    gradient = model[0].weight.grad.clone()
    with pytest.raises(NotFinite, match=rf"1\.bias is {word}") as caught:
        optimizer.clip()
    assert caught.value.name == "1.bias"
    assert torch.equal(model[0].weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumed_from_its_state_is_the_same_run_to_the_bit(dtype: torch.dtype) -> None:
    config = Config(schedule=Schedule(peak=0.01, warmup=0.2, decay="cosine"), weight_decay=0.1)
    straight = network(dtype)
    optimizer, average = Optimizer(straight, config), WeightAverage(straight)
    losses = train(straight, optimizer, range(20), average)

    first = network(dtype)
    before, kept = Optimizer(first, config), WeightAverage(first)
    train(first, before, range(9), kept)
    second = network(dtype)
    after, resumed = Optimizer(second, config), WeightAverage(second)
    second.load_state_dict(copied(first.state_dict()))
    after.load(copied(before.state()))
    resumed.load(copied(kept.state()))
    assert train(second, after, range(9, 20), resumed) == losses[9:]
    for one, other in ((straight.state_dict(), second.state_dict()), (optimizer.state(), after.state()),
                       (average.state(), resumed.state())):  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("left_out", ["exp_avg", "exp_avg_sq", "step"])
def test_a_resumed_run_without_part_of_the_state_is_another_run(left_out: str) -> None:
    model = network()
    optimizer = Optimizer(model, Config(schedule=Schedule(peak=0.01, warmup=0)))
    train(model, optimizer, range(5))
    state, weights = copied(optimizer.state()), copied(model.state_dict())
    expected = train(model, optimizer, range(5, 10))
    other = network()
    other.load_state_dict(weights)
    resumed = Optimizer(other, optimizer.config)
    resumed.load({n: torch.zeros_like(t) if n.startswith(left_out + ".") else t for n, t in state.items()})
    assert train(other, resumed, range(5, 10)) != expected


def test_a_state_of_another_model_is_refused_by_name() -> None:
    optimizer = Optimizer(network(), Config())
    good = optimizer.state()
    with pytest.raises(ValueError, match="no optimizer state"):
        optimizer.load({})
    with pytest.raises(ValueError, match=r"exp_avg\.0\.weight is missing"):
        optimizer.load({name: t for name, t in good.items() if name != "exp_avg.0.weight"})
    with pytest.raises(ValueError, match="extra is not known"):
        optimizer.load({**good, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(3,\).*this model has \(5,\)"):
        optimizer.load({**good, "exp_avg.2.bias": torch.zeros(3)})


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        Optimizer(network().requires_grad_(False), Config())


def test_the_average_follows_its_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = WeightAverage(model, decay=0.25)
    expected = 0.0
    for count in range(1, 8):
        with torch.no_grad():
            model.weight.fill_(float(count))
        average.update(count)
        decay = min(0.25, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
    assert average.state()["weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_averaged_weights_are_swapped_in_and_out_to_the_bit(dtype: torch.dtype) -> None:
    model = network(dtype)
    average = WeightAverage(model)
    train(model, Optimizer(model, Config(schedule=Schedule(peak=0.1, warmup=0))), range(3), average)
    own = copied(model.state_dict())
    with pytest.raises(RuntimeError, match="evaluation failed"), average.swapped():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, average.state()[name].to(dtype))
        assert not torch.equal(model[2].weight, own["2.weight"])
        raise RuntimeError("evaluation failed")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
