"""Training files as the authors' trainer leaves them, written by torch with stand-ins for the classes they name.

omegaconf, lightning and transformers are not needed: a class with their module and name gives the same pickle.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from test_importers import HEADS, LENGTH, VOCAB, theirs

CLASSES = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "IntegerNode"),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "transformers.models.bert": ("BertTokenizer", "BasicTokenizer", "WordpieceTokenizer"),
    "transformers.models.gpt2": ("GPT2TokenizerFast", "GPT2Tokenizer"),
    "tokenizers": ("Tokenizer", "AddedToken"),
}


class _Fast:
    """`tokenizers.Tokenizer`, whose state is its JSON in bytes."""

    def __init__(self, state: bytes) -> None:
        self.state = state

    def __getstate__(self) -> bytes:
        return self.state


@contextmanager
def stand_ins():
    """The classes, where pickle looks for them."""
    before = dict(sys.modules)
    made = {}
    for module, names in CLASSES.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules[".".join(parts[:end])] = ModuleType(".".join(parts[:end]))
        for name in names:
            base = (_Fast,) if (module, name) == ("tokenizers", "Tokenizer") else ()
            made[name] = type(name, base, {"__module__": module, "__qualname__": name})
            setattr(sys.modules[module], name, made[name])
    try:
        yield made
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def config_object(made, value, parent=None):
    """An omegaconf object of plain data, with the types that it notes of its own: a list's keys are of type int."""
    node = made[{dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")]()
    node.__dict__["_metadata"] = made["ContainerMetadata" if isinstance(value, dict | list) else "Metadata"]()
    node.__dict__["_parent"] = parent
    match value:
        case dict():
            node.__dict__["_metadata"].__dict__.update(object_type=dict, key_type=Any, element_type=Any)
            node.__dict__["_content"] = {key: config_object(made, part, node) for key, part in value.items()}
        case list():
            node.__dict__["_metadata"].__dict__.update(object_type=list, key_type=int, element_type=Any)
            node.__dict__["_content"] = [config_object(made, part, node) for part in value]
        case _:
            node.__dict__["_val"] = value
    return node


def tokenizer_object(made, text: str, **special):
    """A fast tokenizer of transformers."""
    fast = made["GPT2TokenizerFast"]()
    tokens = {}
    for name, content in special.items():
        tokens[name] = made["AddedToken"]()
        tokens[name].__dict__.update(content=content, lstrip=False)
    fast.__dict__.update(_tokenizer=made["Tokenizer"](text.encode()), _special_tokens_map=tokens, padding_side="right")
    return fast


def python_object(made, kind: str, **state):
    """A tokenizer of transformers in plain Python; a member that is the name of a class is an object of it."""
    found = made[kind]()
    for name, value in state.items():
        if isinstance(value, str) and value in made:
            value = made[value]()
            value.__dict__["do_lower_case"] = True
        found.__dict__[name] = value
    return found


SETTINGS = {
    "esolm": {"name": "esolm", "alpha_0": 0.25, "diffusion_attn_mode": "causal", "sequential_attn_mode": "causal"}
    | {"diffusion_shuffle": True},
    "mdlm": {"name": "mdlm", "loss_type": "elbo"},
    "ar": {"name": "ar", "prepend_token": "mask"},
    "bd3lm": {"name": "bd3lm", "cross_attn": True},
}


def written(
    path: Path,
    *,
    algo: dict | None = SETTINGS["esolm"],
    conditioned: bool = True,
    change=lambda weights: weights,
    average=True,
    tokenizer: str | None = None,
    special: dict | None = None,
    python: dict | None = None,
    more: dict | None = None,
    **other,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Write a training file; returns its raw and its averaged weights under the authors' names.

    `algo` None leaves the settings out; `more` adds to them, `other` to the file.
    """
    raw = change(theirs(conditioned))
    mean = {name: tensor * 0.5 if name != "rotary_emb.inv_freq" else tensor for name, tensor in raw.items()}
    order = sorted(raw)  # as a file may have them
    with stand_ins() as made:
        hyper = {}
        if algo is not None:
            model = {"length": LENGTH, "n_heads": HEADS}
            data = {"tokenizer_name_or_path": "gpt2"}
            wandb = {"tags": ["log-linear", algo.get("name")]}
            every = {"algo": algo, "model": model, "data": data, "wandb": wandb, **(more or {})}
            hyper["config"] = config_object(made, every)
        if tokenizer is not None:
            hyper["tokenizer"] = tokenizer_object(made, tokenizer, **(special or {}))
        if python is not None:
            hyper["tokenizer"] = python_object(made, **python)
        root = {
            "global_step": 1234,
            "pytorch-lightning_version": "2.2.1",
            "state_dict": {f"backbone.{name}": raw[name] for name in order},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "hyper_parameters": hyper,
            "loops": {},
            **other,
        }
        if average:
            root["ema"] = {"decay": 0.9999, "shadow_params": [mean[name] for name in parameters(raw)]}
        torch.save(root, path)
    return raw, mean


def parameters(weights) -> list[str]:
    """The names in the order of the authors' module, written out by hand."""
    names = ["vocab_embed.embedding"]
    names += [name for name in weights if name.startswith("sigma_map.mlp.0")]
    names += [name for name in weights if name.startswith("sigma_map.mlp.2")]
    layers = sum("attn_qkv" in name for name in weights)
    for layer in range(layers):
        parts = ["norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight"]
        parts += ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
        names += [f"blocks.{layer}.{part}" for part in parts]
        names += [name for name in weights if name.startswith(f"blocks.{layer}.adaLN_modulation.")]
    names += ["output_layer.norm_final.weight", "output_layer.linear.weight", "output_layer.linear.bias"]
    return names + [name for name in weights if name.startswith("output_layer.adaLN_modulation.")]


def words(count: int = VOCAB - 1, **special: int) -> str:
    """A tokenizer.json of the words w0, w1, ... with special tokens behind or among them."""
    vocab = {f"w{number}": number for number in range(count)}
    vocab = {name: number for name, number in vocab.items() if number not in special.values()} | special
    added = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for name, number in special.items()
    ]
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "decoder", "post_processor"))
    data = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    return json.dumps({**data, **nothing})
