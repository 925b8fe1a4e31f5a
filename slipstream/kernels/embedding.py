"""Token ids to vectors."""

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.registry import op


@op("embedding(Tensor weight, Tensor token_ids) -> Tensor")
def embedding(weight_VH: Tensor, token_ids_T: Tensor) -> Tensor:
    return functional.embedding(token_ids_T, weight_VH)
