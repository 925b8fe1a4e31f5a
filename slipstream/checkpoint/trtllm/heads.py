"""The heads that a TensorRT-LLM folder may hold beside its model, by the names that their authors publish them under.

    MedusaForCausalLM       medusa_heads.{h}.medusa_layers.{l}.linear.*, medusa_heads.{h}.lm_head.weight
    ReDrafterForCausalLM    drafter.*; drafter.layers.{l}.linear.* and drafter.lm_head.weight are its head
    EagleForCausalLM        eagle_nets.{n}.drafter.*, a Llama of one layer; all n are the same

Of every linear but the layer of EAGLE's own a rank has a share of the rows. What they say of their depth and width is
TensorRT-LLM's way to build an engine, and not read. Facts: examples/{medusa,redrafter,eagle}/convert_checkpoint.py and
tensorrt_llm/models/{medusa,redrafter,eagle} of https://github.com/NVIDIA/TensorRT-LLM.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from slipstream.checkpoint.trtllm.architectures import ARCHITECTURES, HEADS, POSITIONS, read_decoder
from slipstream.checkpoint.trtllm.ranks import MAX_RANKS, RankTensors, Split
from slipstream.errors import ModelError
from slipstream.schema.options import Options

Rows = tuple[str, slice]  # of one of their tensors
EAGLE = "eagle_nets.0.drafter."
EAGLE_NAMES = {
    "vocab_embedding": "embed_tokens", "layers.0.post_layernorm": "layers.0.post_attention_layernorm",
    "layers.0.attention.dense": "layers.0.self_attn.o_proj", "layers.0.mlp.fc": "layers.0.mlp.gate_proj",
    "layers.0.mlp.gate": "layers.0.mlp.up_proj", "layers.0.mlp.proj": "layers.0.mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class _HeadSplit(Split):
    def of(self, name: str, num_dims: int) -> tuple[int | None, tuple[int, ...]]:
        if name.startswith((f"{EAGLE}layers.", f"{EAGLE}vocab_embedding.")):
            return super().of(f"transformer.{name.removeprefix(EAGLE)}", num_dims)
        return 0, (1,)


class HeadTensors:
    """A TensorSource under the published names."""

    def __init__(self, path: Path, tensors: RankTensors, rows: dict[str, Rows]) -> None:
        self.path, self._tensors, self._rows = path, tensors, rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def names(self) -> list[str]:
        return list(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        theirs, rows = self._rows[name]
        first, *rest = self._tensors.shape(theirs)
        return len(range(first)[rows]), *rest

    def read(self, name: str) -> Tensor:
        theirs, rows = self._rows[name]
        return self._tensors.read(theirs)[rows]


def open_head(folder: Path, values: dict[str, Any], method: str) -> tuple[dict[str, Any], HeadTensors]:
    """The config.json that a published head of this method would have, and its tensors.

    values: of the folder's config.json. Raises ModelError where it holds no such head, or one in fewer bits.
    """
    source = f"{folder}/config.json"
    head = HEADS.get(str(values.get("architecture")))
    if head is None or head.method != method:
        holds = "no head" if head is None else f"a head for {head.method}"
        raise ModelError(f"{source} is of {values.get('architecture')}, which holds {holds}; give one of {method}.")
    options = Options(values, source)
    mapping = options.section("mapping") or Options({}, source)
    tp_size = mapping.integer("tp_size", 1, high=MAX_RANKS)
    config, split, published = _READERS[method](options, tp_size)
    tensors = RankTensors.open(folder, split, adds_one_to_norms=False)
    names = [name for name in tensors.names() if name.startswith(head.prefix)]
    packed = [name for name in names if tensors.dtype(name) not in (torch.float32, torch.float16, torch.bfloat16)]
    if packed:
        tensors.close()
        raise ModelError(
            f"{folder} has {packed[0]} in {str(tensors.dtype(packed[0])).removeprefix('torch.')}; heads are read as "
            "floats only, so give the folder of the head as it is published."
        )
    rows = {own: (name, part) for name in names for own, part in published(name).items()}
    return config, HeadTensors(folder / "rank0.safetensors", tensors, rows)


Reader = Callable[[Options, int], tuple[dict[str, Any], Split, Callable[[str], dict[str, slice]]]]
ALL = slice(None)


def _medusa(options: Options, tp_size: int) -> tuple[dict[str, Any], Split, Callable[[str], dict[str, slice]]]:
    num_layers = options.integer("num_medusa_layers", 1, low=0)

    def published(name: str) -> dict[str, slice]:
        name = name.removeprefix("medusa_heads.").replace(".medusa_layers.", ".")
        return {name.replace(".lm_head.", f".{num_layers}."): ALL}

    return {"medusa_num_layers": num_layers}, _rows_alone(options, tp_size), published


def _redrafter(options: Options, tp_size: int) -> tuple[dict[str, Any], Split, Callable[[str], dict[str, slice]]]:
    num_layers = options.integer("redrafter_num_layers", low=0)
    split = _rows_alone(options, tp_size)

    def published(name: str) -> dict[str, slice]:
        name = name.removeprefix("drafter.").replace("lm_head.", f"lm_head.{num_layers}.")
        return {re.sub(r"^layers\.", "lm_head.", name): ALL}

    config = {
        "hidden_size": options.integer("redrafter_hidden_size"),
        "vocab_size": split.vocab_size,
        "exit_dim": options.integer("redrafter_exit_dim"),
        "num_draft_layers": num_layers,
        "rnn": options.boolean("redrafter_is_rnn"),
        "width": options.integer("redrafter_num_beams", 5),
        "length": options.integer("redrafter_draft_len_per_beam", 5),
    }
    return config, split, published


def _eagle(options: Options, tp_size: int) -> tuple[dict[str, Any], Split, Callable[[str], dict[str, slice]]]:
    net = options.section("eagle_net_config")
    if net is None:
        raise ModelError("The config.json of an EagleForCausalLM has an eagle_net_config; convert the model again.")
    config = read_decoder(net, ARCHITECTURES["LlamaForCausalLM"])
    config.pop(POSITIONS)
    is_split, dim = net.boolean("use_parallel_embedding"), net.choice("embedding_sharding_dim", (0, 1), 0)
    heads = config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]
    ends = [sum(heads[:count]) * config["head_dim"] for count in range(4)]
    split = _HeadSplit(tp_size, heads, config["vocab_size"], dim if is_split and tp_size > 1 else None)

    def published(name: str) -> dict[str, slice]:
        plain, _, parameter = name.removeprefix(EAGLE).rpartition(".")
        if not name.startswith(EAGLE):
            return {}  # the others are as the first one, and their lm_head is the model's
        if plain == "layers.0.attention.qkv":
            parts = zip("qkv", ends[:3], ends[1:], strict=True)
            return {f"layers.0.self_attn.{part}_proj.{parameter}": slice(*rows) for part, *rows in parts}
        return {f"{EAGLE_NAMES.get(plain, plain)}.{parameter}": ALL}

    return config, split, published


def _rows_alone(options: Options, tp_size: int) -> Split:
    return _HeadSplit(tp_size, (1, 1, 1), options.integer("vocab_size"))


_READERS: dict[str, Reader] = {"medusa": _medusa, "redrafter": _redrafter, "eagle": _eagle}
