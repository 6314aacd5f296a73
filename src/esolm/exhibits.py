"""What a report shows, made from what the package has: replays of texts, curves of a journal, pictures of the rule.

Each function turns values of one kind into values of `report`; nothing here trains, writes or draws.
"""

from collections.abc import Iterator, Sequence

import torch

from esolm import attention, recipes, report, watch
from esolm.algorithms import Request, View
from esolm.algorithms.algorithm import Batch
from esolm.model import Model
from esolm.noise import Noise
from esolm.sample import Reveal

NAMES = {"ar": "AR", "mdlm": "MDLM", "bd3lm": "BD3-LM", "esolm-a": "Eso-LM (A)", "esolm-b": "Eso-LM (B)"}
_READS = {
    "ar": "every row reads the tokens before it.",
    "mdlm": "every row reads every row, the masks too.",
    "bd3lm": "the noisy rows of a block read each other and the clean blocks before it.",
    "esolm-a diffusion": "tokens read each other; a mask reads them and the masks before it.",
    "esolm-a sequential": "a mask reads what diffusion wrote and the true tokens to its left.",
    "esolm-b diffusion": "rows read what was written before them, so a token's keys and values never change.",
    "esolm-b sequential": "a mask reads all that was written before it: everything can be cached.",
}
_LETTERS = 2  # the id of "a" in the text of the pictures
_MASK = 1


def replay(model: Model, title: str, caption: str, request: Request, reveals: Sequence[Reveal]) -> report.Replay:
    """A text as it was written, with the string of each of its tokens."""
    end_id = model.tokenizer.end_id
    tokens = dict.fromkeys(range(request.length), model.tokenizer.pad_id) | dict(
        request.given
    )  # never written: after the end
    for reveal in reveals:
        tokens.update(zip(reveal.positions, reveal.tokens, strict=True))
    ends = (p for p in range(request.length) if tokens[p] == end_id and p not in request.given)
    end = next(ends, request.length) if request.stop_at_end else request.length
    strings = watch.pieces(model.tokenizer.decode, list(tokens.values()))
    return report.replay_of(title, caption, strings, reveals, end=end)


def curves(entries: Sequence[dict[str, object]]) -> Iterator[report.Curve]:
    """Training and validation loss of a journal's entries."""
    for name, keys in (("training", ("loss",)), ("validation", ("validation", "validation_error"))):
        points = [
            (float(entry["step"]), *(float(entry[key]) for key in keys))  # type: ignore[arg-type]
            for entry in entries
            if keys[0] in entry
        ]
        if points:
            yield report.Curve(name=name, points=tuple(points))


def pictures() -> Iterator[report.Picture]:
    """The rule, drawn for a text of eight tokens as each method sees it in training."""
    batch = Batch.of(torch.arange(_LETTERS, _LETTERS + 8)[None])
    noise = Noise(seed=3, step=0, start=0, stop=1, total=1)
    for name in recipes.METHODS:
        alpha_0, block_size = (0.5 if name.startswith("esolm") else None), (4 if name == "bd3lm" else None)
        views = recipes.method(name, alpha_0, block_size).bound(batch, noise, mask_id=_MASK)
        for view in views:
            yield _picture(name, view, alone=len(views) == 1)


def _picture(name: str, view: View, *, alone: bool) -> report.Picture:
    masks = (view.tokens[0] == _MASK).tolist()
    places = [p if masked else token - _LETTERS for p, token, masked in _rows(view)]
    return report.Picture(
        name=NAMES[name] if alone else f"{NAMES[name]}, {view.term}",
        caption=_READS[name if alone else f"{name} {view.term}"].capitalize(),
        rows=tuple(attention.picture(view.stage[0], view.public[0]).split("\n")),
        labels=tuple("abcdefgh"[place] for place in places),
        masks=tuple(masks),
    )


def _rows(view: View) -> list[tuple[int, int, bool]]:
    """Position, token, and whether it is a mask, of each row."""
    tokens = view.tokens[0].tolist()
    return [(p, token, token == _MASK) for p, token in zip(view.positions[0].tolist(), tokens, strict=True)]
