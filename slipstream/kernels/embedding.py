"""Token ids to vectors."""

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.fits import need_floats
from slipstream.kernels.registry import op


def _shapes(weight_VH: Tensor, token_ids_T: Tensor) -> Tensor:
    need_floats(weight=weight_VH)
    _, hidden_size = weight_VH.shape
    (num_tokens,) = token_ids_T.shape
    return weight_VH.new_empty(num_tokens, hidden_size)


@op("embedding(Tensor weight, Tensor token_ids) -> Tensor", shapes=_shapes, is_row_by_row=True)
def embedding(weight_VH: Tensor, token_ids_T: Tensor) -> Tensor:
    return functional.embedding(token_ids_T, weight_VH)
