"""EAGLE's layer as it is published: what each tensor of a folder's model.safetensors is, and what the layer computes.

                     f  hidden states of the model at a token      e  embedding of the token after it

    EAGLE 1 and 2    x = fc [e; f]                                 f: what the model's head reads
                     h = x + attention(x);  h + mlp(norm h)        is the next f, and the model's own head reads it
    EAGLE-3          g = fc f                                      f: what three of the model's layers read
                     h = g + attention([norm e; norm g]);  h + mlp(norm h)
                                                                   is the next g; norm and a head of its own say tokens

    config.json      of Llama with one layer; EAGLE-3 may name its layers: eagle_aux_hidden_state_layer_ids (what they
                     read, as in vLLM; inside eagle_config what they give, as in SGLang), norm_before_residual
    tensors          fc, then layers.0.* or midlayer.*; embed_tokens, where it is not the model's own
    EAGLE-3          also norm, lm_head [D, H] and d2t [D]: the draft token i is the model's i + d2t[i]; t2d is not read
                     draft_token_ids [D] instead of the last two: the tokens whose rows of the model's head it has

(SafeAILab/EAGLE, eagle/model/cnets1.py and cnets.py; vLLM, models/llama_eagle.py and llama_eagle3.py.) A first layer
of EAGLE 1 has no input norm. Heads of slipstream train-drafter are EAGLE-3's and share the model's head.

Products of the same x are one here: queries, keys and values (each of which is asked for alone, too); gate and up.

Shape suffixes: N rows, H hidden size of the layer, E of its embedding, F of what is read of the model, X queries,
Y keys or values, Z what queries and keys are made of, V vocabulary of the model, D that of drafts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.errors import ModelError
from slipstream.layers.rope import inverse_frequencies
from slipstream.schema.model import Options, read_decoder
from slipstream.speculative.head_file import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    HeadFile,
    Product,
    ToProduct,
    open_head,
    read_draft_tokens,
    read_shaped,
    torch_product,
)

WEIGHTS_FILE, PICKLED_FILE = "model.safetensors", "pytorch_model.bin"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
LAYER_NAMES = ("midlayer.", "layers.0.")
NOT_READ = ("t2d", "inv_freq", "lm_head.weight")  # the last of EAGLE 1, whose head is the model's
EMBEDDING = "embed_tokens.weight"

LAST = -1  # of hidden_layers: what the model's head reads

JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

Shapes = dict[str, tuple[int, ...]]
Layer = tuple[Tensor, Tensor | None]  # weight and bias


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(total, weight, eps), total


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


class Ops(NamedTuple):
    """What the layer is computed by: torch, which autograd follows, or kernels of ours."""

    to_product: ToProduct = torch_product
    norm: Callable[[Tensor, Tensor, float], Tensor] = _norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = _add_norm  # and the sum
    gated: Callable[[Tensor], Tensor] = _gated  # silu of the first half, times the second


TORCH = Ops()


@dataclass(frozen=True)
class Sizes:
    """Of the model that drafts are for."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_seq_len: int


@dataclass(frozen=True, kw_only=True)
class Config:
    hidden_layers: tuple[int, ...]  # what it reads of the model: of a layer's number what that layer reads, or LAST
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_drafted_ids: int  # the vocabulary of drafts
    eps: float
    adds_normed: bool  # EAGLE-3: attention is added to norm g, not to g
    inv_freq: Tensor
    rope_scale: float


@dataclass(frozen=True)
class Head(ABC):
    config: Config
    weights: Mapping[str, Tensor]  # that nothing is multiplied by, and
    products: Mapping[str, Product]  # the others, as products_of gives them
    shared_head: Product | None = None  # the model's own, for the tokens that are drafted
    ops: Ops = TORCH

    @property
    def embedding(self) -> Tensor | None:
        """[V, E]; None where it is the model's own."""
        return self.weights.get(EMBEDDING)

    @abstractmethod
    def read(self, f_NF: Tensor) -> Tensor:
        """The model's hidden states as the layer has its own. -> [N, H]"""

    @abstractmethod
    def enter(self, e_NE: Tensor, f_NH: Tensor) -> tuple[Tensor, Tensor]:
        """What queries, keys and values are made of, [N, Z], and what attention is added to, [N, H]."""

    def queries(self, x_NZ: Tensor) -> Tensor:
        return self.products["self_attn.q_proj"](x_NZ)

    def keys_values(self, x_NZ: Tensor) -> tuple[Tensor, ...]:
        """[N, Y] each; keys are not rotated yet."""
        return self.products["self_attn.kv_proj"](x_NZ).chunk(2, 1)

    def queries_keys_values(self, x_NZ: Tensor) -> tuple[Tensor, ...]:
        num_queries, num_keys = (
            num * self.config.head_dim for num in (self.config.num_heads, self.config.num_kv_heads)
        )
        return self.products["self_attn.qkv_proj"](x_NZ).split((num_queries, num_keys, num_keys), 1)

    def leave(self, attended_NX: Tensor, residual_NH: Tensor) -> Tensor:
        """The hidden states of the next token, as the layer has its own. -> [N, H]"""
        weight = self.weights["post_attention_layernorm.weight"]
        o_NH = self.products["self_attn.o_proj"](attended_NX)
        x_NH, h_NH = self.ops.add_norm(o_NH, residual_NH, weight, self.config.eps)
        return h_NH + self.products["mlp.down_proj"](self.ops.gated(self.products["mlp.gate_up_proj"](x_NH)))

    @abstractmethod
    def logits(self, h_NH: Tensor, head: Product) -> Tensor:
        """Of the token after the next, in the vocabulary of drafts. head: the model's own."""

    def token_ids(self, drafted: Tensor) -> Tensor:
        """Of the model, for those of drafts."""
        return drafted

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.ops.norm(x, self.weights[f"{name}.weight"], self.config.eps)


class Eagle1(Head):
    def read(self, f_NF: Tensor) -> Tensor:
        return f_NF

    def enter(self, e_NE: Tensor, f_NH: Tensor) -> tuple[Tensor, Tensor]:
        x_NH = self.products["fc"](torch.cat((e_NE, f_NH), 1))
        return x_NH, x_NH

    def logits(self, h_NH: Tensor, head: Product) -> Tensor:
        return head(h_NH)


class Eagle3(Head):
    def read(self, f_NF: Tensor) -> Tensor:
        return self.products["fc"](f_NF)

    def enter(self, e_NE: Tensor, f_NH: Tensor) -> tuple[Tensor, Tensor]:
        normed_NH = self._norm("hidden_norm", f_NH)
        x_NZ = torch.cat((self._norm("input_layernorm", e_NE), normed_NH), 1)
        return x_NZ, normed_NH if self.config.adds_normed else f_NH

    def logits(self, h_NH: Tensor, head: Product) -> Tensor:
        x_NH = self._norm("norm", h_NH)
        return self.products["lm_head"](x_NH) if self.shared_head is None else self.shared_head(x_NH)

    def token_ids(self, drafted: Tensor) -> Tensor:
        offsets_D = self.weights.get("d2t")
        return drafted if offsets_D is None else drafted + offsets_D[drafted]


def load(
    folder: Path, sizes: Sizes, dtype: torch.dtype, device: torch.device, head_of_tokens: Callable[[Tensor], Product],
    ops: Ops,
) -> Head:  # fmt: skip
    """The layer for a model of these sizes; head_of_tokens gives the model's own for some tokens, to be shared.

    Raises ModelError for that of another model, and for what is no such folder.
    """
    with open_head(folder, "eagle", WEIGHTS_FILE, PICKLED_FILE, "an EAGLE head") as (values, file):
        stored = {_plain(name): name for name in file.names()}
        is_third = "hidden_norm.weight" in stored
        config = read_config(folder / CONFIG_FILE, values, sizes, is_third=is_third)
        is_sharing = is_third and DRAFT_TOKENS in stored
        if is_sharing:
            _check(folder / CONFIG_FILE, "hidden_size", config.hidden_size, sizes.hidden_size)
        shapes, optional = shapes_of(config, sizes, is_third=is_third, is_sharing=is_sharing)
        weights = _read(file, stored, shapes, optional, dtype, device)
        shared = None
        if is_sharing and (token_ids_D := read_draft_tokens(file, sizes.vocab_size)) is not None:
            weights["d2t"] = offsets_of(weights.pop(DRAFT_TOKENS))
            shared = head_of_tokens(token_ids_D)
    if is_third and "d2t" in weights:
        _check_ids(folder, weights["d2t"], sizes.vocab_size)
    products = products_of(weights, ops.to_product)
    others = {name: each for name, each in weights.items() if name == EMBEDDING or each.ndim == 1}
    if is_third:
        return Eagle3(config, others, products, shared, ops)
    return Eagle1(config, others, products, ops=ops)


def products_of(weights: Mapping[str, Tensor], to_product: ToProduct) -> dict[str, Product]:
    """By the matrices among published weights."""
    layers = {
        (layer := name.removesuffix(".weight")): (each, weights.get(f"{layer}.bias"))
        for name, each in weights.items()
        if each.ndim == 2 and name != EMBEDDING
    }
    num_queries = len(weights["self_attn.q_proj.weight"])
    for name, parts in JOINED.items():
        layers[name] = _joined([layers.pop(part) for part in parts])
    weight, bias = layers["self_attn.qkv_proj"]
    for name, rows in (("self_attn.q_proj", slice(num_queries)), ("self_attn.kv_proj", slice(num_queries, None))):
        layers[name] = weight[rows], None if bias is None else bias[rows]
    return {name: to_product(*layer) for name, layer in layers.items()}


def _joined(parts: Sequence[Layer]) -> Layer:
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])


def offsets_of(token_ids_D: Tensor) -> Tensor:
    """d2t of these tokens."""
    return token_ids_D - torch.arange(len(token_ids_D), device=token_ids_D.device)


def _plain(name: str) -> str:
    """Its layer is the only one, whatever it is called."""
    name = name.removeprefix("model.")
    for layer in LAYER_NAMES:
        name = name.removeprefix(layer)
    return name


def read_config(path: Path, values: dict[str, Any], sizes: Sizes, *, is_third: bool) -> Config:
    """path: of these values, for messages."""
    options = Options(values, str(path))
    shape = read_decoder(options, max_position_embeddings=2048)
    options.choice("hidden_act", ("silu",), "silu")
    _check(path, "vocab_size", shape["vocab_size"], sizes.vocab_size)
    if is_third:
        hidden_size = options.integer("target_hidden_size", sizes.hidden_size)
        _check(path, "target_hidden_size", hidden_size, sizes.hidden_size)
    else:
        _check(path, "hidden_size", shape["hidden_size"], sizes.hidden_size)
    rope = shape["rope"]
    return Config(
        hidden_layers=_layers_read(path, values, sizes.num_layers) if is_third else (LAST,),
        hidden_size=shape["hidden_size"],
        intermediate_size=options.integer("intermediate_size"),
        num_heads=shape["num_heads"],
        num_kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        num_drafted_ids=options.integer("draft_vocab_size", sizes.vocab_size, high=sizes.vocab_size),
        eps=options.real("rms_norm_eps", 1e-6),
        adds_normed=options.boolean("norm_before_residual"),
        inv_freq=inverse_frequencies(rope, sizes.max_seq_len),
        rope_scale=rope.attention_factor,
    )


def _check(path: Path, name: str, its: int, the_models: int) -> None:
    if its != the_models:
        raise ModelError(f"{path} has {name} {its} and the model {the_models}; take the head that was trained for it.")


def _layers_read(path: Path, values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    inside = values.get("eagle_config")
    given = values.get(LAYER_IDS)
    after = inside.get(LAYER_IDS) if isinstance(inside, dict) else None
    if given is None and after is None:
        given = [2, num_layers // 2, num_layers - 3]
    layers = given if given is not None else after
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise ModelError(f"{path} has {LAYER_IDS} {layers!r}; it must be a list of layers, such as [2, 16, 29].")
    read = tuple(layer + (given is None) for layer in layers)
    for layer in read:
        if not 0 <= layer < num_layers:
            raise ModelError(
                f"{path} drafts from what layer {layer} reads, and the model has {num_layers} layers; take the head "
                "that was trained for it."
            )
    return read


def shapes_of(config: Config, sizes: Sizes, *, is_third: bool, is_sharing: bool = False) -> tuple[Shapes, Shapes]:
    """Of the tensors that must be there, and of those that may. is_sharing: the model's own head."""
    size, inner, num_read = config.hidden_size, config.intermediate_size, len(config.hidden_layers)
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    num_in = 2 * size if is_third else size
    shapes: Shapes = {
        "fc.weight": (size, num_read * sizes.hidden_size if is_third else 2 * size),
        "self_attn.q_proj.weight": (num_queries, num_in),
        "self_attn.k_proj.weight": (num_keys, num_in),
        "self_attn.v_proj.weight": (num_keys, num_in),
        "self_attn.o_proj.weight": (size, num_queries),
        "post_attention_layernorm.weight": (size,),
        "mlp.gate_proj.weight": (inner, size),
        "mlp.up_proj.weight": (inner, size),
        "mlp.down_proj.weight": (size, inner),
    }
    optional: Shapes = {
        "fc.bias": (size,),
        "self_attn.q_proj.bias": (num_queries,),
        "self_attn.k_proj.bias": (num_keys,),
        "self_attn.v_proj.bias": (num_keys,),
        "self_attn.o_proj.bias": (size,),
    }
    embedding: Shapes = {EMBEDDING: (sizes.vocab_size, size)}
    if not is_third:
        return shapes, optional | embedding
    shapes |= {f"{name}.weight": (size,) for name in ("input_layernorm", "hidden_norm", "norm")}
    if is_sharing:
        return shapes | {DRAFT_TOKENS: (config.num_drafted_ids,)}, optional | embedding
    shapes |= {"lm_head.weight": (config.num_drafted_ids, size)}
    if config.num_drafted_ids < sizes.vocab_size:
        shapes |= {"d2t": (config.num_drafted_ids,)}
    else:
        optional |= {"d2t": (config.num_drafted_ids,)}
    if size != sizes.hidden_size:
        return shapes | embedding, optional
    return shapes, optional | embedding


def _read(
    file: HeadFile, stored: Mapping[str, str], shapes: Shapes, optional: Shapes, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    missing = next((name for name in shapes if name not in stored), None)
    if missing is not None:
        raise ModelError(f"{file.path} lacks {missing}, which an EAGLE head has; name a folder of a whole one.")
    known, weights = shapes | optional, {}
    for name, stored_name in stored.items():
        if name not in known:
            if name.endswith(NOT_READ):
                continue
            raise ModelError(f"{file.path} has {stored_name}, which no EAGLE head here has; take one of EAGLE 1 to 3.")
        tensor = read_shaped(file, stored_name, known[name])
        weights[name] = tensor.to(device, torch.int64 if name in ("d2t", DRAFT_TOKENS) else dtype, copy=True)
    return weights


def _check_ids(folder: Path, offsets_D: Tensor, vocab_size: int) -> None:
    ids_D = torch.arange(len(offsets_D), device=offsets_D.device) + offsets_D
    if int(ids_D.min()) < 0 or int(ids_D.max()) >= vocab_size:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} has a d2t that names tokens beyond the model's {vocab_size}; take the head that "
            "was trained for it."
        )
