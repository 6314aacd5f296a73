"""The five methods, a file each, none importing another: what the denoiser is shown, in what order text is written."""

from esolm.algorithms.algorithm import Algorithm, Plan, Request, View
from esolm.algorithms.ar import AR
from esolm.algorithms.bd3lm import BD3LM
from esolm.algorithms.esolm import EsoLM
from esolm.algorithms.mdlm import MDLM

__all__ = ["AR", "BD3LM", "MDLM", "Algorithm", "EsoLM", "Plan", "Request", "View"]
