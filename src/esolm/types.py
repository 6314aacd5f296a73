"""Tensor types with named dimensions, and the one legend of those names.

    batch   texts worked on together            vocab  ids, the mask (the last one) included
    row     rows fed to the network             width  size of a hidden state
    length  places of a text                    head   attention heads (kv_head: those of keys and values)
    slot    places of a KV cache                dim    size of one head

It names shapes only; it holds no code.
"""

from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

Rows = Int64[Tensor, "batch row"]
RowFlags = Bool[Tensor, "batch row"]
RowWeights = Float[Tensor, "batch row"]
Hidden = Float[Tensor, "batch row width"]
Texts = Int64[Tensor, "batch length"]
TextFlags = Bool[Tensor, "batch length"]
TextUniforms = Float64[Tensor, "batch length"]
