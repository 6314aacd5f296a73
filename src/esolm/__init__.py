"""Language models between autoregression and masked diffusion: train, evaluate, sample.

    import esolm
    model = esolm.load("out/demo/run")
    print(model.sample(prompt="JULIET.")[0])

Names and modules are imported when they are first used, so that `import esolm` costs nothing. Training is
`esolm.train.train`: a module hides a function of its name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esolm.kernels import limit

if TYPE_CHECKING:
    from esolm import checkpoint, corpus, demo, evaluate, prepare, recipes, shards, share, train
    from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
    from esolm.denoiser import Config, Denoiser
    from esolm.model import Model, load
    from esolm.order import Interleaved, Uniform
    from esolm.tokenizer import Tokenizer
    from esolm.train import Run

__all__ = [
    "AR",
    "BD3LM",
    "MDLM",
    "Config",
    "Denoiser",
    "EsoLM",
    "Interleaved",
    "Model",
    "Run",
    "Tokenizer",
    "Uniform",
    "checkpoint",
    "corpus",
    "demo",
    "evaluate",
    "load",
    "prepare",
    "recipes",
    "shards",
    "share",
    "train",
]
__version__ = "0.1.0"

limit()

_HOMES = {
    **dict.fromkeys(("AR", "BD3LM", "MDLM", "EsoLM"), "esolm.algorithms"),
    **dict.fromkeys(("Config", "Denoiser"), "esolm.denoiser"),
    **dict.fromkeys(("Model", "load"), "esolm.model"),
    **dict.fromkeys(("Interleaved", "Uniform"), "esolm.order"),
    "Tokenizer": "esolm.tokenizer",
    "Run": "esolm.train",
}
_MODULES = ("checkpoint", "corpus", "demo", "evaluate", "prepare", "recipes", "shards", "share", "train")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"esolm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'esolm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
