"""Manifest: config.json of an engine folder. What the graph is for, its limits, and how it was made."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from slipstream.errors import EngineError
from slipstream.schema.build import (
    DTYPES,
    KV_DTYPES,
    KV_DTYPES_OF,
    MAX_BATCH_SIZE,
    MAX_RANKS,
    MAX_TOKENS_PER_BLOCK,
    PLUGINS,
)
from slipstream.schema.kv import KVGroup, group_layers, narrow
from slipstream.schema.mapping import Mapping
from slipstream.schema.model import MAX_LAYERS

_LARGEST = {
    "max_batch_size": MAX_BATCH_SIZE,
    "num_layers": MAX_LAYERS,
    "kv_planes": 2,
    "tokens_per_block": MAX_TOKENS_PER_BLOCK,
    "tp_size": MAX_RANKS,
    "pp_size": MAX_RANKS,
    "moe_ep_size": MAX_RANKS,
}  # these many things are made at once

_NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

_MODULE = re.compile(r"[A-Za-z_][\w.]{0,200}", re.ASCII)

RANK_KEYS = ("num_kv_heads", "layers", "graph_sha256", "memory")
FORMAT = "slipstream-engine"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    name: str  # the model, for people
    model_type: str
    dtype: str
    kv_dtype: str  # the same, or a narrower one
    # shape
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_planes: int  # keys and values, or latents alone
    kv_skip_layers: list[int]  # whose keys and values have `dtype`, though others have kv_dtype
    windows: list[int]  # of each layer: how many tokens a token sees; 0 for all
    # limits of one step and of one sequence
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    # what the runtime must know of the graph
    logits: str  # "selected": one row for each of step.logit_rows; "all": one for each token
    graph_sha256: str
    # ranks that share the model; what they do not have in common, unless there is one alone
    tp_size: int
    pp_size: int
    moe_ep_size: int
    layers: list[int]  # the first, and the one after the last
    ranks: list[dict[str, Any]]  # of each: RANK_KEYS, which above are those of the first rank or of the whole model
    # how it was made
    slipstream_version: str
    torch_version: str
    passes: list[dict[str, Any]] = field(default_factory=list)
    op_modules: list[str] = field(default_factory=list)  # modules outside this package that declare ops of the graph
    plugins: dict[str, str] = field(default_factory=dict)  # of schema/build.py: PLUGINS; "measured" or "disabled"
    memory: dict[str, int] = field(default_factory=dict)
    # the model's own generation defaults (generation_config.json)
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.tp_size, self.pp_size)

    @property
    def num_ranks(self) -> int:
        return self.mapping.num_ranks

    def of_rank(self, rank: int) -> Self:
        """As that rank's process has it, whose KV cache is of its own layers and heads."""
        return replace(self, **self.ranks[rank]) if self.ranks else self

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self._eos_values())

    @property
    def disabled_plugins(self) -> tuple[str, ...]:
        return tuple(name for name, state in self.plugins.items() if state == "disabled")

    @property
    def kv_cache_dtype(self) -> str:
        """The dtype of keys and values by the name that a build takes."""
        return next((name for name, dtype in KV_DTYPES.items() if dtype == self.kv_dtype), self.kv_dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """In all layers that are here, as long as no window has left the token behind."""
        return self._kv_bytes(range(*self.layers))

    def kv_dtype_of(self, layer: int) -> str:
        return self.dtype if layer in self.kv_skip_layers else self.kv_dtype

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """How the layers that are here share KV blocks, unless a start narrows their windows."""
        return self.those_here(group_layers(narrow(self.windows, (), self.max_seq_len)))

    def those_here(self, groups: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
        """The groups of a model, each with the layers that are here: maybe none."""
        here = range(*self.layers)
        return tuple(
            replace(group, layers=tuple(layer for layer in group.layers if layer in here)) for group in groups
        )  # fmt: skip

    def max_kv_blocks(self, num_tokens: int, chunk: int = 1) -> int:
        """Most blocks that a sequence holds at once on its way to num_tokens, `chunk` tokens a step at most."""
        return sum(group.max_blocks(num_tokens, chunk, self.tokens_per_block) for group in self.kv_groups)

    def kv_block_bytes(self, groups: Sequence[KVGroup]) -> int:
        """A block of one group; equal in all."""
        return max(self._kv_bytes(group.layers) for group in groups) * self.tokens_per_block

    def _kv_bytes(self, layers: Iterable[int]) -> int:
        """Of a token in these layers."""
        numbers = self.kv_planes * self.num_kv_heads * self.head_dim
        return sum(numbers * _NUM_BYTES[self.kv_dtype_of(layer)] for layer in layers)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """Raises EngineError where the engine was made by another version or by no build of ours."""
        if values.get("format") != FORMAT:
            raise EngineError(f"{where} is not an engine; make one with slipstream build --output_dir {where}.")
        if values.get("version") != VERSION:
            raise EngineError(f"{where} has engine format {values.get('version')!r}, not {VERSION}; build it again.")
        kinds = {each.name: each.type for each in fields(cls)}
        missing = [name for name in kinds if name not in values]
        unknown = [name for name in values if name not in kinds and name not in ("format", "version")]
        if missing or unknown:
            what = "missing" if missing else "unknown"
            raise EngineError(f"{where}/config.json: the key {(missing or unknown)[0]!r} is {what}.")
        for name, kind in kinds.items():
            _check(where, name, values[name], kind)
        manifest = cls(**{name: values[name] for name in kinds})
        manifest._check_choices(where)
        manifest._check_ranks(where)
        return manifest

    def _check_choices(self, where: str) -> None:
        if self.dtype not in DTYPES:
            raise EngineError(f"{where}/config.json: dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        kv_dtypes = (self.dtype, *KV_DTYPES.values(), *KV_DTYPES_OF.get(self.dtype, ()))
        if self.kv_dtype not in kv_dtypes:
            known = ", ".join(kv_dtypes)
            raise EngineError(f"{where}/config.json: kv_dtype is {self.kv_dtype!r}; it must be one of {known}.")
        if len(self.windows) != self.num_layers or not all(type(w) is int and 0 <= w < 2**31 for w in self.windows):
            raise EngineError(f"{where}/config.json: windows must be a whole number for each layer, 0 for none.")
        if not all(type(layer) is int and 0 <= layer < self.num_layers for layer in self.kv_skip_layers):
            raise EngineError(f"{where}/config.json: kv_skip_layers must be layers, from 0 to {self.num_layers - 1}.")
        if self.logits not in ("selected", "all"):
            raise EngineError(f"{where}/config.json: logits is {self.logits!r}; it must be selected or all.")
        if not all(type(token_id) is int and 0 <= token_id < self.vocab_size for token_id in self._eos_values()):
            eos = self.generation["eos_token_id"]
            raise EngineError(f"{where}/config.json: eos_token_id is {eos!r}; it must be token ids.")

    def _check_ranks(self, where: str) -> None:
        if len(self.ranks) != (self.num_ranks if self.num_ranks > 1 else 0):
            raise EngineError(f"{where}/config.json: ranks must say of each of {self.num_ranks} ranks what it has.")
        kinds = {each.name: each.type for each in fields(self)}
        for values in self.ranks:
            if not isinstance(values, dict) or values.keys() != set(RANK_KEYS):
                raise EngineError(f"{where}/config.json: ranks must have {', '.join(RANK_KEYS)} of each.")
            for name, value in values.items():
                _check(where, name, value, kinds[name])
        for layers in (self.layers, *(values["layers"] for values in self.ranks)):
            bounds = [each for each in layers if type(each) is int and 0 <= each <= self.num_layers]
            is_range = len(bounds) == len(layers) == 2 and bounds[0] < bounds[1]
            if not is_range or (layers is self.layers and bounds != [0, self.num_layers]):
                raise EngineError(
                    f"{where}/config.json: layers is {str(layers)[:80]}; it must be a range of the {self.num_layers}, "
                    "and of the whole model all."
                )

    def _eos_values(self) -> list[Any]:
        """One, several or none; of any type until they are checked."""
        value = self.generation.get("eos_token_id")
        return value if isinstance(value, list) else [] if value is None else [value]


def _check(where: str, name: str, value: Any, kind: Any) -> None:
    if kind is int:
        ok = type(value) is int and 0 < value <= _LARGEST.get(name, 2**31)
    elif name == "memory":
        ok = isinstance(value, dict) and all(type(size) is int and 0 <= size < 2**63 for size in value.values())
    elif name == "op_modules":
        ok = isinstance(value, list) and all(isinstance(each, str) and _MODULE.fullmatch(each) for each in value)
    elif name == "plugins":
        ok = isinstance(value, dict) and set(value) <= set(PLUGINS)
        ok = ok and all(choice in ("measured", "disabled") for choice in value.values())
    elif kind is str:
        ok = isinstance(value, str) and len(value) < 4096 and value.isprintable()  # not to steer a terminal
    else:
        ok = isinstance(value, list if str(kind).startswith("list") else dict)
    if not ok:
        raise EngineError(f"{where}/config.json: {name} is {str(value)[:80]!r}, which no build writes.")
