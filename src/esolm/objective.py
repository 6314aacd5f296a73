"""The objective of every method: `sum(weights * cross_entropy)` over rows, without ever holding all logits.

The head's logits are made a chunk of rows at a time, and the gradients of hidden states and head are taken from each
chunk while it is there: three matrix products a row, as in the plain computation, and memory of one chunk. It knows
views and no algorithm.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from esolm.algorithms.algorithm import View
from esolm.attention import Relation, relation, relation_in_tiles
from esolm.denoiser import Denoiser
from esolm.inference import Network

MULTIPLE = 16  # of targets, in bf16 on a CPU: oneDNN makes twelve kernels for each number of them, in 4 ms
_CHUNK_ROWS = 512  # rows whose logits are held at a time: at fewer, adding to the gradient of a large head dominates


def weighted_cross_entropy(
    hidden: Float[Tensor, "row width"],
    head: torch.nn.Linear,
    targets: Int64[Tensor, "row"],
    weights: Float[Tensor, "row"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "row"]]:
    """Returns the sum of `weights * nll` (differentiable) and the `nll` of each row in nats (not differentiable).

    The mask, the last id, has no probability. Under autocast the products run in its dtype, softmax in float32.
    """
    loss, nll = _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, weights
    )
    return loss, nll


def of_view(
    denoiser: Denoiser, view: View, noise: torch.Generator | None = None, who: Relation | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch row"]]:
    """One pass of the denoiser over a view: the sum of `weights * nll` (differentiable), and `weights * nll` of each
    row (not differentiable; zero where a row has no target). Logits are made for rows with a target only.

    `noise` is for dropout; a pass without it drops nothing. `who` stands in for the view's own relation."""
    weights, targets = view.weights.flatten(), view.targets.flatten()
    dtype = _dtype(denoiser.embed.weight)
    who = who or relation_in_tiles(view.stage, view.public, dtype)
    wanted = weights.nonzero()[:, 0]
    multiple = MULTIPLE if dtype == torch.bfloat16 and weights.device.type == "cpu" else 1
    rows, target, weight = (_filled(each, multiple) for each in (wanted, targets[wanted], weights[wanted]))
    hidden = denoiser(view.tokens, view.positions, who, wanted=rows, noise=noise)
    loss, nll = weighted_cross_entropy(hidden, denoiser.head, target, weight)
    weighted = torch.zeros_like(weights).index_put_((wanted,), (nll * weight)[: len(wanted)])
    return loss, weighted.view_as(view.weights)


def scores_of_view(network: Network, view: View) -> Float[Tensor, "batch row"]:
    """`weights * nll` of each row, as `of_view` gives them, by any network: also the one that writes, smaller weights
    and all."""
    if isinstance(network, Denoiser):
        return of_view(network, view)[1]
    weights, targets = view.weights.flatten(), view.targets.flatten()
    rows = weights.nonzero()[:, 0]
    hidden = network(view.tokens, view.positions, relation(view.stage, view.public)).flatten(0, 1)
    scores = torch.zeros_like(weights)
    for part in torch.split(rows, _CHUNK_ROWS):
        found = log_probabilities(network.logits(hidden[part])).gather(1, targets[part, None])[:, 0]
        scores[part] = -found * weights[part]
    return scores.view_as(view.weights)


def _filled(rows: Shaped[Tensor, "row"], multiple: int) -> Shaped[Tensor, "more"]:
    """With zeros behind them: targets of weight zero in row zero, which change nothing."""
    return torch.nn.functional.pad(rows, (0, -len(rows) % multiple))


def log_probabilities(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Log-softmax over all ids but the mask, whose log-probability is -inf."""
    masked = logits.float().clone()
    masked[..., -1] = -torch.inf
    return masked.log_softmax(-1)


def _dtype(weight: Tensor) -> torch.dtype:
    """Of products with this weight."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        device, dtype = hidden.device.type, _dtype(weight)
        inputs, matrix = hidden.detach().to(dtype), weight.detach().to(dtype)
        wanted = any(ctx.needs_input_grad)
        nll = torch.empty(len(inputs), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(inputs) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wanted else None
        # made once: the pages of a new array for every chunk cost as much as its sums
        products = torch.empty(min(_CHUNK_ROWS, len(inputs)), len(weight), dtype=dtype, device=hidden.device)
        held = products if dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for at in range(0, len(inputs), _CHUNK_ROWS):
                part = slice(at, at + _CHUNK_ROWS)
                x, target = inputs[part], targets[part, None]
                product, logits = products[: len(x)], held[: len(x)]
                _logits(x, matrix, bias, product, logits)
                peak, wanted_logit = logits.amax(-1, keepdim=True), logits.gather(1, target)
                odds = logits.sub_(peak).exp_()  # in place: a second array of this size costs more than the sum
                total = odds.sum(-1, keepdim=True)
                nll[part] = (total.log() + peak - wanted_logit)[:, 0]
                if grad_hidden is None or grad_weight is None or grad_bias is None:
                    continue
                # weights times d nll / d logits = weights * (softmax - one_hot(target))
                scale = weights[part, None].float()
                grad = odds.mul_(scale / total).scatter_add_(1, target, -scale)
                grad_bias += grad.sum(0)
                grad = grad if held is products else product.copy_(grad)
                torch.mm(grad, matrix, out=grad_hidden[part])
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias if bias is not None else None)
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            (grad_hidden * scale).to(ctx.hidden_dtype),
            grad_weight * scale,
            None if grad_bias is None else grad_bias * scale,
            None,
            None,
        )


def _logits(inputs: Tensor, matrix: Tensor, bias: Tensor | None, product: Tensor, out: Tensor) -> None:
    """Logits in `out`, in float32, by way of `product`, which has the dtype of the product (and may be `out`)."""
    torch.mm(inputs, matrix.T, out=product)
    if product.dtype != out.dtype:
        out.copy_(product)
    if bias is not None:
        out += bias
    out[:, -1] = -torch.inf
