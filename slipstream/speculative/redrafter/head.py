"""ReDrafter's head as it is published: what each tensor of a folder's model.safetensors is, and what it computes.

    h        what the model's head read where the last known token was chosen
    s        0, and with each token silu(rnn_w e + rnn_u s), or e + s without rnn; e is the model's embedding of it
    logits   of the token after it: lm_head [h; s]

    config.json                         vocab_size, hidden_size, exit_dim (X), num_draft_layers, rnn; width, length (5)
    input_proj.weight, .bias            [X, 2H] and [X], where X is not 2H
    lm_head.{layer}.linear.weight       [X, X], with a .bias [X]: x + silu(linear(x))
    lm_head.{num_draft_layers}.weight   [V, X]
    rnn_w.weight, rnn_u.weight, .bias   [H, H], [H, H] and [H]
    draft_token_ids                     [D] instead of lm_head's last: the tokens whose rows of the model's head it has

Also with input_projs and lm_heads, or with 0 for lm_head, as TensorRT-LLM's converter reads them
(apple/ml-recurrent-drafter, recurrent_drafting/modeling_drafter.py; heads of slipstream train-drafter are of the last
kind.)

Shape suffixes: H hidden size, X exit_dim, V vocabulary, D tokens that can be drafted; before them any others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.errors import ModelError
from slipstream.schema.model import Options
from slipstream.speculative.head_file import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    Product,
    ToProduct,
    open_head,
    read_draft_tokens,
    read_shaped,
    torch_product,
)

WEIGHTS_FILE, PICKLED_FILE = "model.safetensors", "pytorch_model.bin"
MODEL_TYPE = "recurrent_drafting_drafter"
OTHER_NAMES = {"input_projs": "input_proj", "lm_heads": "lm_head", "0": "lm_head"}


@dataclass(frozen=True)
class Head:
    input_proj: Product | None
    layers: Sequence[Product]
    output: Product  # [..., X] -> [..., D]
    rnn_w: Product | None
    rnn_u: Product | None
    token_ids_D: Tensor | None = None  # noqa: N815 - a tensor's name carries its shape; of a shared head's rows
    width: int = 5  # beams that it is to be searched with, and
    length: int = 5  # tokens of each

    def state(self, e_H: Tensor, s_H: Tensor) -> Tensor:
        """With one more token."""
        if self.rnn_w is None or self.rnn_u is None:
            return e_H + s_H
        return functional.silu(self.rnn_w(e_H) + self.rnn_u(s_H))

    def logits(self, h_H: Tensor, s_H: Tensor) -> Tensor:
        """Of the token after those that s has taken in. -> [..., D]"""
        x_X = torch.cat((h_H, s_H), -1)
        if self.input_proj is not None:
            x_X = self.input_proj(x_X)
        for layer in self.layers:
            x_X = x_X + functional.silu(layer(x_X))
        return self.output(x_X)

    def token_ids(self, drafted: Tensor) -> Tensor:
        """Of the model, for rows of the head."""
        return drafted if self.token_ids_D is None else self.token_ids_D[drafted]


def _plain(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{OTHER_NAMES.get(first, first)}.{rest}"


def load(
    folder: Path, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device,
    head_of_tokens: Callable[[Tensor], Product], to_product: ToProduct = torch_product,
) -> Head:  # fmt: skip
    """The head for a model of these sizes; head_of_tokens gives the model's own for some tokens, to be shared.

    Raises ModelError for that of another model, and for what is no such folder.
    """
    with open_head(folder, "redrafter", WEIGHTS_FILE, PICKLED_FILE, "a ReDrafter head") as (values, file):
        if (kind := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ModelError(f"{folder / CONFIG_FILE} has model_type {kind!r}; a ReDrafter head is of {MODEL_TYPE!r}.")
        options = Options(values, str(folder / CONFIG_FILE))
        for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            if (its := options.integer(name)) != size:
                raise ModelError(
                    f"{folder / CONFIG_FILE} has {name} {its} and the model {size}; take the head that was trained "
                    "for it."
                )
        exit_dim, num_layers = options.integer("exit_dim"), options.integer("num_draft_layers", low=0)
        has_rnn = options.boolean("rnn")
        stored = {_plain(name): name for name in file.names() if name != DRAFT_TOKENS}

        def read(name: str, *shape: int) -> Tensor:
            return read_shaped(file, stored.pop(name, name), shape).to(device, dtype, copy=True)

        def product(name: str, num_out: int, num_in: int, *, has_bias: bool = True) -> Product:
            weight = read(f"{name}.weight", num_out, num_in)
            return to_product(weight, read(f"{name}.bias", num_out) if has_bias else None)

        token_ids_D = read_draft_tokens(file, vocab_size)
        if token_ids_D is not None and exit_dim != hidden_size:
            raise ModelError(
                f"{file.path} shares the model's head, which reads {hidden_size} numbers and not exit_dim {exit_dim}; "
                "take a head with an lm_head of its own."
            )
        head = Head(
            None if exit_dim == 2 * hidden_size else product("input_proj", exit_dim, 2 * hidden_size),
            [product(f"lm_head.{layer}.linear", exit_dim, exit_dim) for layer in range(num_layers)],
            product(f"lm_head.{num_layers}", vocab_size, exit_dim, has_bias=False)
            if token_ids_D is None
            else head_of_tokens(token_ids_D),
            product("rnn_w", hidden_size, hidden_size, has_bias=False) if has_rnn else None,
            product("rnn_u", hidden_size, hidden_size) if has_rnn else None,
            None if token_ids_D is None else token_ids_D.to(device),
            options.integer("width", Head.width),
            options.integer("length", Head.length),
        )
    if unknown := sorted(stored.values()):
        raise ModelError(f"{file.path} has {unknown[0]}, which its config.json does not tell of.")
    return head
