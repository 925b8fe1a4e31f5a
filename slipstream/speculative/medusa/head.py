"""Medusa's heads as they are published: what each layer of a folder's medusa_lm_head.safetensors is.

    config.json                    medusa_num_layers: residual layers of a head, 1 where it does not say
    medusa_choices.json            the tree that was measured for these heads, where there is one
    {h}.{layer}.linear.weight      [H, H], with a .bias [H]: x + silu(linear(x))
    {h}.{medusa_num_layers}.weight [V, H]: the logits of the token after the next, for head 0, and so on
    draft_token_ids                [D] instead of these: the tokens whose rows of the model's own head all heads share

The file says how many heads there are; config.json of the first published ones does not (FasterDecoding/Medusa, TGI).
Those of slipstream train-drafter share the model's head.

Shape suffixes: S rows, H hidden size, V vocabulary, D tokens that can be drafted, N heads, K tokens of each.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.errors import ModelError
from slipstream.speculative.head_file import (
    CONFIG_FILE,
    Product,
    ToProduct,
    open_head,
    read_draft_tokens,
    read_shaped,
    torch_product,
)

WEIGHTS_FILE, PICKLED_FILE = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
CHOICES_FILE = "medusa_choices.json"


class Heads(NamedTuple):
    num_heads: int
    layers: Sequence[Product]  # one above the other: [N, S, H] -> [N, S, H], where N may be the first heads only
    lm_heads: Sequence[Product]  # of each head, or one for all
    num_tokens: int  # that can be drafted
    token_ids_D: Tensor | None = None  # noqa: N815 - a tensor's name carries its shape; of the shared one's rows

    def first(self, count: int) -> "Heads":
        """Only these: a tree of few nodes does not reach the others."""
        return self._replace(num_heads=min(count, self.num_heads), lm_heads=self.lm_heads[:count])

    def logits(self, x_SH: Tensor) -> Tensor:
        """[N, S, V], or [N, S, D] of heads that share the model's."""
        x_NSH = x_SH.expand(self.num_heads, -1, -1)
        for layer in self.layers:
            x_NSH = x_NSH + functional.silu(layer(x_NSH))
        if len(self.lm_heads) == 1:
            return self.lm_heads[0](x_NSH)
        return torch.stack([head(x) for x, head in zip(x_NSH, self.lm_heads, strict=True)])

    def token_ids(self, places: Tensor) -> Tensor:
        """Of the model, for those of logits."""
        return places if self.token_ids_D is None else self.token_ids_D[places]


def load(
    folder: Path, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device,
    head_of_tokens: Callable[[Tensor], Product], to_product: ToProduct | None = None,
) -> Heads:  # fmt: skip
    """The heads for a model of these sizes; head_of_tokens gives its own for some tokens, for heads that share it.

    to_product: for each head's own; without it a layer is one product of all heads.

    Raises ModelError for those of another model, and for what is no such folder.
    """
    with open_head(folder, "medusa", WEIGHTS_FILE, PICKLED_FILE, "Medusa heads") as (config, file):
        num_layers = config.get("medusa_num_layers", 1)
        if type(num_layers) is not int or num_layers < 0:
            raise ModelError(f"{folder / CONFIG_FILE} has medusa_num_layers {num_layers!r}; it must be a whole number.")

        def read(name: str, *shape: int) -> Tensor:
            return read_shaped(file, name, shape).to(device, dtype, copy=True)

        numbers = [first for name in file.names() if (first := name.partition(".")[0]).isdigit()]
        heads = range(1 + max(map(int, numbers), default=0))
        layers = [
            _layer(
                [read(f"{head}.{layer}.linear.weight", hidden_size, hidden_size) for head in heads],
                [read(f"{head}.{layer}.linear.bias", hidden_size) for head in heads],
                to_product,
            )
            for layer in range(num_layers)
        ]
        token_ids_D = read_draft_tokens(file, vocab_size)
        if token_ids_D is None:
            weights = (read(f"{head}.{num_layers}.weight", vocab_size, hidden_size) for head in heads)
            own = [(to_product or torch_product)(weight_VH, None) for weight_VH in weights]
            return Heads(len(heads), layers, own, vocab_size)
    return Heads(len(heads), layers, [head_of_tokens(token_ids_D)], len(token_ids_D), token_ids_D.to(device))


def _layer(weights: list[Tensor], biases: list[Tensor], to_product: ToProduct | None) -> Product:
    if to_product is None:
        weight_NHH, bias_N1H = torch.stack(weights), torch.stack(biases)[:, None]
        return lambda x_NSH: torch.baddbmm(bias_N1H[: len(x_NSH)], x_NSH, weight_NHH[: len(x_NSH)].mT)
    products = list(map(to_product, weights, biases))
    return lambda x_NSH: torch.stack([product(x_SH) for product, x_SH in zip(products, x_NSH, strict=False)])
