"""What a call of the transformers library asks for: options that are said, else those of a `GenerationConfig`, else the
default; and a line for what would silently do nothing. It knows no model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esolm.draw import Draw
from esolm.whole import whole

HARMLESS = {"num_beams": 1, "use_cache": True, "repetition_penalty": 1.0, "length_penalty": 1.0}


class Choice:
    """An option: what was said in the call, else in a `GenerationConfig`, else the default."""

    def __init__(self, config: Any) -> None:
        self._config = {} if config is None else config.to_dict()

    def __call__(self, name: str, said: Any, default: Any) -> Any:
        given = self._config.get(name) if said is None else said
        return default if given is None else given

    def draw(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Draw:
        """How tokens are drawn; the library's top_k of 0 keeps all."""
        return Draw(
            temperature=self("temperature", temperature, 1.0),
            top_k=self("top_k", top_k, None) or None,
            top_p=self("top_p", top_p, 1.0),
        )

    def end(self, said: int | list[int] | None, default: int | None) -> int | None:
        """The end-of-text, which the library also gives as a list. ValueError for several."""
        found = self("eos_token_id", said, default)
        ends = found if isinstance(found, list | tuple) else [found]
        if len(ends) != 1:
            raise ValueError(f"eos_token_id must be one id, got {ends}: a text has one end-of-text here")
        return None if ends[0] is None else whole("eos_token_id", ends[0])


def refuse(what: str, options: Mapping[str, Any]) -> None:
    """ValueError for options that would silently do nothing, but not where they ask for nothing else."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if unknown := sorted(name for name, value in given.items() if value != HARMLESS.get(name)):
        raise ValueError(f"{what} has no {unknown[0]} for this model: leave it out")


def valid_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens `[text, token]` are no padding. ValueError for other shapes."""
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        seen = "" if mask is None else f", and attention_mask of {list(mask.shape)}"
        raise ValueError(f"give input_ids as [text, token] and attention_mask as long, got {list(ids.shape)}{seen}")
    return torch.ones_like(ids).bool() if mask is None else mask.bool()
