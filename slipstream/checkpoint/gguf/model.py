"""A GGUF file as a model to convert: tensors with the converter's changes undone, options, vocabulary."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from slipstream.checkpoint.gguf.architectures import ROPE_TENSORS, find_architecture
from slipstream.checkpoint.gguf.blocks import TYPES, part_of
from slipstream.checkpoint.gguf.file import GGMLType, GGUFFile
from slipstream.checkpoint.gguf.header import Header
from slipstream.checkpoint.packed import PackedLinear, PackedTensors
from slipstream.errors import CorruptFile
from slipstream.schema.weights import WeightTable

ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)", re.ASCII)
Parts = dict[str, Callable[[], torch.Tensor]]
BY_HEAD = re.compile(r"blk\.\d+\.attn_([kv])_b\.weight", re.ASCII)  # of latent attention: a matrix for each head


@dataclass(frozen=True)
class TokenizerFacts:
    """The vocabulary as the file has it; None where it does not say."""

    model: str  # "gpt2" (byte-level BPE), "llama" (SentencePiece), …
    pre: str | None  # the pre-tokenizer, by llama.cpp's name
    tokens: list[str]
    scores: list[float] | None
    token_types: list[int] | None  # 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    merges: list[str] | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_template: str | None


class GGUFModel:
    """The tensors by llama.cpp's names, which `weights` relates to ours, and the config.json of such a model."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.path = file.path
        self._header = Header(file)
        self._architecture = find_architecture(self._header)
        self._num_heads = self._header.positive("attention.head_count")
        self._num_kv_heads = self._header.positive("attention.head_count_kv", self._num_heads)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Raises CorruptFile or ModelError as GGUFFile does, and UnsupportedModel for another architecture."""
        file = GGUFFile.open(path)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    @property
    def weights(self) -> WeightTable:
        """As a model file's WEIGHTS, with these names for Hugging Face's."""
        return self._architecture.weights

    def names(self) -> list[str]:
        return [name for name in self._file.names() if name not in ROPE_TENSORS]

    def shape(self, name: str) -> tuple[int, ...]:
        shape, by_head = self._file.shape(name), BY_HEAD.fullmatch(name)
        if not by_head or len(shape) != 3:
            return shape
        num_heads, num_rows, num_columns = shape
        return (num_heads * num_columns, num_rows) if by_head[1] == "k" else (num_heads * num_rows, num_columns)

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """As GGUFFile.read, with what llama.cpp's converter changed put back."""
        tensor, by_head = self._file.read(name), BY_HEAD.fullmatch(name)
        if by_head and tensor.dim() == 3:
            return (tensor.mT if by_head[1] == "k" else tensor).flatten(0, 1)
        if self._architecture.adds_one_to_norms and name.endswith("norm.weight"):
            return tensor - 1
        return self._in_halves(name, tensor)

    def packed(self) -> PackedTensors:
        """The same tensors, in which matrices of the types that we have formats for keep the numbers of the file."""
        types = {name: self._file.ggml_type(name) for name in self.names() if len(self._file.shape(name)) == 2}
        linears: dict[str, PackedLinear] = {}
        for name, ggml_type in types.items():
            if ggml_type in TYPES:
                format, shape = TYPES[ggml_type].format, self._file.shape(name)
                parts: Parts = {part: partial(self._part, name, ggml_type, part) for part in format.parts(*shape)}
                linears[name] = PackedLinear(format, shape, parts)
        return PackedTensors(self, linears, hidden=set(linears))

    def _part(self, name: str, ggml_type: GGMLType, part: str) -> torch.Tensor:
        return self._in_halves(name, part_of(self._file.blocks(name), ggml_type, part))

    def _in_halves(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows that rotate together half a head apart, as in Hugging Face, and not next to each other."""
        rotated = ROTATED.fullmatch(name) if self._architecture.reorders_rope else None
        if rotated is None:
            return tensor
        num_heads = self._num_heads if rotated[1] == "q" else self._num_kv_heads
        if not tensor.dim() or tensor.shape[0] % (2 * num_heads):
            raise CorruptFile(f"{self.path}: tensor {name!r} cannot be split into {num_heads} heads of even size.")
        pairs = tensor.view(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def hf_config(self) -> dict[str, Any]:
        """The config.json a Hugging Face folder of this model would have (architectures._rope has one key of ours).

        Raises UnsupportedModel for a hyperparameter that is not known.
        """
        config = {
            "model_type": self._architecture.model_type,
            **self._architecture.options(self._header),
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": not self._header.has_tensor("output.weight"),
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._token_id("eos"),
            "torch_dtype": self._torch_dtype(),
        }
        self._header.finish()
        return config

    def generation_config(self) -> dict[str, Any]:
        """The generation_config.json: `eos_token_id` lists every token that ends a turn or the text."""
        ends = (self._token_id(name) for name in ("eos", "eot", "eom"))
        return {
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": list(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        }

    def tokenizer_facts(self) -> TokenizerFacts:
        """The raw vocabulary. Raises CorruptFile where its lists do not fit together."""
        header = self._header
        tokens = header.values("tokenizer.ggml.tokens", str)
        if tokens is None:
            raise CorruptFile(f"{self.path} has no tokenizer.ggml.tokens.")
        if len(tokens) != self._vocab_size():
            raise CorruptFile(f"{self.path} has {len(tokens)} tokens and embeddings for {self._vocab_size()}.")
        facts = TokenizerFacts(
            model=header.required("tokenizer.ggml.model", str),
            pre=header.optional("tokenizer.ggml.pre", str),
            tokens=tokens,
            scores=header.values("tokenizer.ggml.scores", float),
            token_types=header.values("tokenizer.ggml.token_type", int),
            merges=header.values("tokenizer.ggml.merges", str),
            bos_token_id=self._token_id("bos"),
            eos_token_id=self._token_id("eos"),
            unk_token_id=self._token_id("unknown"),
            pad_token_id=self._token_id("padding"),
            add_bos=header.optional("tokenizer.ggml.add_bos_token", bool),
            add_eos=header.optional("tokenizer.ggml.add_eos_token", bool),
            add_space_prefix=header.optional("tokenizer.ggml.add_space_prefix", bool),
            chat_template=header.optional("tokenizer.chat_template", str),
        )
        for values in (facts.scores, facts.token_types):
            if values is not None and len(values) != len(tokens):
                raise CorruptFile(f"{self.path} has {len(tokens)} tokens and {len(values)} scores or types for them.")
        return facts

    def _vocab_size(self) -> int:
        return self._file.shape(self._require_tensor("token_embd.weight"))[0]

    def _torch_dtype(self) -> str:
        """What read() gives for the large matrices: float32 where they are quantized."""
        experts = "blk.0.ffn_down_exps.weight"
        name = experts if self._header.has_tensor(experts) else self._require_tensor("blk.0.ffn_down.weight")
        return str(self._file.dtype(name)).removeprefix("torch.")

    def _require_tensor(self, name: str) -> str:
        if not self._header.has_tensor(name) or not self._file.shape(name):
            raise CorruptFile(f"{self.path} has no tensor {name!r}.")
        return name

    def _token_id(self, name: str) -> int | None:
        """None where unset, or outside the vocabulary: some converters write -1 for "none"."""
        token_id = self._header.optional(f"tokenizer.ggml.{name}_token_id", int)
        return token_id if token_id is not None and 0 <= token_id < self._vocab_size() else None
