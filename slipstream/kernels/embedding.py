"""Token ids to vectors."""

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats
from slipstream.kernels.registry import op


def _shapes(weight_VH: Tensor, token_ids_T: Tensor) -> Tensor:
    need_floats(weight=weight_VH)
    _, hidden_size = weight_VH.shape
    (num_tokens,) = token_ids_T.shape
    return weight_VH.new_empty(num_tokens, hidden_size)


def _part_shapes(weight_VH: Tensor, token_ids_T: Tensor, first: int) -> Tensor:
    need(first >= 0, "first must not be negative")
    return _shapes(weight_VH, token_ids_T)


@op("embedding(Tensor weight, Tensor token_ids) -> Tensor", shapes=_shapes, is_row_by_row=True)
def embedding(weight_VH: Tensor, token_ids_T: Tensor) -> Tensor:
    return functional.embedding(token_ids_T, weight_VH)


@op("embedding_part(Tensor weight, Tensor token_ids, int first) -> Tensor", shapes=_part_shapes, is_row_by_row=True)
def embedding_part(weight_VH: Tensor, token_ids_T: Tensor, first: int) -> Tensor:
    """Of a table of which these are the rows from `first` on: zeros for tokens whose rows are elsewhere."""
    places_T = token_ids_T - first
    is_here_T = (places_T >= 0) & (places_T < weight_VH.shape[0])
    found_TH = functional.embedding(places_T.where(is_here_T, 0), weight_VH)
    return found_TH.masked_fill_(~is_here_T[:, None], 0)


native(embedding)
