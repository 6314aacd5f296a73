"""What must not reach an update: weights, batches, losses and gradients that are not finite; the first is named.

    weights -> batch -> loss -> gradients (optim.Optimizer.clip)        before anything is changed, on every rank

A weight may be NaN while its gradient is finite (a row of the embedding that no text of the batch uses), so weights are
looked at in every step: one norm a tensor. It repairs nothing.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from esolm.algorithms.algorithm import View
from esolm.optim import NotFinite
from esolm.ranks import Ranks

_CAUSES = ("the weight", "the weights of", "the loss of")  # of a batch, in the order in which they are to blame
REFUSED_IN_A_ROW = 3  # updates that are skipped, at the last of which a run ends: skipping does not save it


class Diverged(ArithmeticError):
    """Numbers stopped being finite and skipping updates did not help. The message says what to change."""


@torch.no_grad()
def bad_weight(weights: Mapping[str, Tensor]) -> NotFinite | None:
    """The first weight with a NaN or an infinity."""
    tensors = [tensor.detach() for tensor in weights.values()]
    norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))
    if bool(torch.isfinite(norms).all()):
        return None
    for name, tensor in weights.items():  # a sum of squares may overflow where every weight is finite
        if not bool(torch.isfinite(tensor).all()):
            return NotFinite(name, _kind(tensor), _CAUSES[0])
    return None


def bad_loss(terms: Mapping[str, float], views: Callable[[], Iterable[View]]) -> NotFinite | None:
    """The batch, if its weights are not finite, or the first term of the loss that is not. `views` are made only
    where a term is bad."""
    wrong = next((term for term, value in terms.items() if not math.isfinite(value)), None)
    if wrong is None:
        return None
    for view in views():
        rows = torch.nonzero(~torch.isfinite(view.weights))
        if len(rows):
            where = f"{view.term} view, text {int(rows[0, 0])}, row {int(rows[0, 1])}"
            return NotFinite(f"the batch ({where})", _kind(view.weights), _CAUSES[1])
    return NotFinite(f"the {wrong} term", _kind(torch.tensor(terms[wrong])), _CAUSES[2])


def everywhere(problem: NotFinite | None, ranks: Ranks) -> NotFinite | None:
    """The first problem that any rank has, told on every rank. In shards all pay for one rank's weight with their
    loss, so causes come before consequences."""
    if ranks.alone:
        return problem
    words = ranks.words("" if problem is None else json.dumps([problem.name, problem.kind, problem.what]))
    found = [(*json.loads(told), rank) for rank, told in enumerate(words) if told]
    if not found:
        return None
    name, kind, what, rank = min(found, key=lambda each: (_CAUSES.index(each[2]), each[3]))
    return NotFinite(f"{name} (rank {rank})", kind, what)


class Refusals:
    """Updates skipped in a row."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, problem: NotFinite, step: int) -> None:
        """One more. Raises Diverged at the third."""
        self._count += 1
        if self._count == REFUSED_IN_A_ROW:
            raise diverged(f"{REFUSED_IN_A_ROW} updates in a row were skipped, the last because {problem}", step)

    def clear(self) -> None:
        """An update was made."""
        self._count = 0


def diverged(why: object, step: int) -> Diverged:
    """The end of a run whose numbers are lost."""
    return Diverged(
        f"stopped at step {step:,}: {why}. The checkpoints are from before: begin again from the newest with a lower "
        "learning rate (esolm train --from RUN --out NEW --set optim.schedule.peak=...), or with dtype=float32"
    )


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
