"""The card of a model: what stands on its page of the Hub, filled from what its checkpoint records.

It tells what is known and no more: a licence is the owner's to give, and paths of this machine stay here.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM
from esolm.model import Model

_PAPERS = {
    EsoLM: ("Esoteric Language Models", "2506.01928"),
    MDLM: ("Simple and Effective Masked Diffusion Language Models", "2406.07524"),
    BD3LM: ("Block Diffusion", "2503.09573"),
}


def card(model: Model, name: str, *, licence: str | None = None) -> str:
    """The card of a model that is to be called `name` ("owner/name"), in Markdown with its front matter."""
    config, facts = model.denoiser.config, model.facts
    return "\n".join(
        [
            *_front(model.algorithm, licence),
            f"# {name.rpartition('/')[2]}",
            "",
            f"{_method(model.algorithm)}: {model.denoiser.num_parameters:,} parameters in {config.layers} layers of "
            f"width {config.width}, {config.vocab_size:,} ids, texts of up to {config.length} tokens.",
            "",
            *_table(facts, exact=model.algorithm.bound_is_exact),
            "## Use",
            "",
            "```sh",
            "pip install 'esolm[hub]'",
            f"esolm sample {name}",
            *([] if isinstance(model.algorithm, AR) else [f'esolm infill {name} "To be, or ____, that is"']),
            "```",
            "",
            "```python",
            "import esolm",
            "",
            f'model = esolm.load("{name}")',
            "print(model.sample()[0])",
            "```",
            *_sources(model.algorithm),
            "",
        ]
    )


def _front(algorithm: Algorithm, licence: str | None) -> list[str]:
    names = {EsoLM: ["eso-lm", "masked-diffusion"], MDLM: ["mdlm", "masked-diffusion"], BD3LM: ["bd3-lm", "diffusion"]}
    tags = ["esolm", *names.get(type(algorithm), ["autoregressive" if isinstance(algorithm, AR) else "language-model"])]
    return [
        "---",
        "library_name: esolm",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        *([f"license: {json.dumps(licence)}"] if licence else []),
        "---",
        "",
    ]


def _method(algorithm: Algorithm) -> str:
    if isinstance(algorithm, EsoLM):
        return f"**Eso-LM ({algorithm.variant})**, trained with `alpha_0` {algorithm.alpha_0:g}"
    if isinstance(algorithm, BD3LM):
        return f"**BD3-LM** with blocks of {algorithm.block_size}"
    return {AR: "**An autoregressive model**", MDLM: "**MDLM**"}.get(type(algorithm), f"**{type(algorithm).__name__}**")


def _table(facts: Mapping[str, Any], *, exact: bool) -> list[str]:
    """What is recorded of its training. Where the figures are bounds, they are called so."""
    rows = []
    if run := facts.get("run"):
        told = f"{facts['step']:,} of {run['num_steps']:,} steps of {run['batch_size']} texts, seed {run['seed']}"
        rows += [("trained", told), ("learning rate", f"{run['optim']['schedule']['peak']:g}")]
    if origin := facts.get("origin"):
        rows.append(("data", _data(origin)))
    if (validation := facts.get("validation")) is not None:
        bits = facts.get("bits_per_byte")  # not recorded by earlier versions
        told = f"{validation:.3f} nats a token" + ("" if bits is None else f", {bits:.3f} bits a byte")
        rows.append(("on text held out", told if exact else f"at most {told}"))
    if imported := facts.get("imported"):
        rows.append(("imported", f"from {PurePath(imported['from']).name}, weights {imported['weights']}"))
    lines = [f"| {label} | {value} |" for label, value in rows]
    return ["| | |", "| --- | --- |", *lines, ""] if lines else []


def _data(origin: Mapping[str, Any]) -> str:
    """Names of data without the folders that they are in."""
    if "sources" in origin:
        parts = zip(origin["sources"], origin["weights"], strict=True)
        return ", ".join(f"{_data(source)} (weight {weight:g})" for source, weight in parts)
    return data_name(str(origin["data"]))


def data_name(data: str) -> str:
    """What others may know of a place of data: its last name, or all of a data set's of the Hub."""
    return data if data.startswith("hf:") else PurePath(data).name or data


def _sources(algorithm: Algorithm) -> list[str]:
    title, number = _PAPERS.get(type(algorithm), ("", ""))
    return ["", "## Source", "", f"{title}, [arXiv:{number}](https://arxiv.org/abs/{number})."] if title else []
