"""EAGLE-3's layer, trained as it drafts: from its own hidden states, over several steps (arXiv:2503.01840).

    chain from token t    step 0        f_t of the model, token t + 1                says token t + 2
                          step 1        the layer's own output at step 0, t + 2      says token t + 3, and so on

A step attends to the rows of step 0 as far as t, and to its own chain's later ones: what the layer's KV cache holds
when it drafts. All chains of a text go a step at once. The head is the model's, for its likely tokens; what is learned
is the model's own distribution over these. Tokens that are taken in are the text's, so steps learn from right drafts.

Shape suffixes: S texts, L tokens of the longest, F what is read of the model, H hidden size, D tokens that can be
drafted, P places of a batch, N = S · L rows, X queries, K KV heads, G queries of each, D numbers of a head, C steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.kernels.rope import rope_cos_sin
from slipstream.speculative.drafter import LAST
from slipstream.speculative.eagle.drafter import Options as Drafting
from slipstream.speculative.eagle.head import (
    CONFIG_FILE,
    LAYER_IDS,
    WEIGHTS_FILE,
    Eagle3,
    Sizes,
    offsets_of,
    products_of,
    read_config,
    shapes_of,
)
from slipstream.speculative.head_file import DRAFT_TOKENS, torch_product
from slipstream.speculative.training import Batch, SharedHead, Taught, Teacher, begins, later, rotated, write_head
from slipstream.speculative.training import Student as Base

LATER_COUNTS_LESS = 0.8  # a step's loss than the last one's, as in the paper's code: all before it must have been right
OF_LAYER = ("self_attn.", "mlp.", "input_layernorm.", "hidden_norm.", "post_attention_layernorm.")


@dataclass(frozen=True)
class Options:
    draft_vocab_size: int = 8192  # tokens that can be drafted


class Student(Base):
    options_type = Options
    reads_embedding = True

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher, options)
        assert teacher.embed is not None
        manifest, self._embed = teacher.engine.manifest, teacher.embed
        self._shared = SharedHead(teacher, options.draft_vocab_size)
        sizes = Sizes(manifest.hidden_size, manifest.vocab_size, manifest.num_layers, manifest.max_seq_len)
        self._values = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "vocab_size": manifest.vocab_size,
            "draft_vocab_size": len(self._shared.token_ids_D),
            "hidden_size": manifest.hidden_size,
            "intermediate_size": 2 * manifest.hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": manifest.num_heads,
            "num_key_value_heads": manifest.num_kv_heads,
            "head_dim": manifest.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": manifest.max_seq_len,
            "norm_before_residual": True,
            LAYER_IDS: list(self.reads_hidden(manifest.num_layers)[:-1]),
        }
        config = read_config(Path(CONFIG_FILE), self._values, sizes, is_third=True)
        self._config = replace(config, inv_freq=config.inv_freq.to(teacher.device))
        shapes, _ = shapes_of(config, sizes, is_third=True, is_sharing=True)
        self._places = {name: name.replace(".", "__") for name in shapes if name != DRAFT_TOKENS}
        for name, place in self._places.items():
            shape = shapes[name]
            tensor = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).uniform_(-1, 1) * shape[1] ** -0.5
            self.register_parameter(place, nn.Parameter(tensor))

    @staticmethod
    def reads_hidden(num_layers: int) -> tuple[int, ...]:
        """What a low, a middle and the last layer read; and what the head reads, for what it would say."""
        return num_layers // 10, num_layers // 2, num_layers - 1, LAST

    def _head(self) -> Eagle3:
        weights = {name: getattr(self, place) for name, place in self._places.items()}
        others = weights | {"d2t": offsets_of(self._shared.token_ids_D)}
        return Eagle3(self._config, others, products_of(weights, torch_product), self._shared)

    def _chains(self, batch: Batch) -> Iterator[Tensor]:
        """Of each step [S, L, H], the layer's output of the chains that begin at each token."""
        assert batch.hidden is not None
        head, config, (num_texts, length) = self._head(), self._config, batch.token_ids.shape
        features_NF = batch.hidden[..., : -config.hidden_size].flatten(0, 1)
        hidden_NH, rows = head.read(features_NF), list[tuple[Tensor, Tensor]]()
        for step in range(Drafting.depth):
            positions_N = torch.arange(step, step + length, device=features_NF.device).repeat(num_texts)
            cos_NF, sin_NF = rope_cos_sin.reference(positions_N, config.inv_freq, config.rope_scale)
            with torch.no_grad():
                e_NH = self._embed(later(batch.token_ids, 1 + step, fill=0).flatten()).float()
            x_NZ, residual_NH = head.enter(e_NH, hidden_NH)
            q_NX, k_NY, v_NY = head.queries_keys_values(x_NZ)
            q_NX, k_NY = (rotated(each, cos_NF, sin_NF, config.head_dim) for each in (q_NX, k_NY))
            sizes = (num_texts, length, config.num_kv_heads, -1, config.head_dim)
            rows.append((k_NY.view(sizes).squeeze(3), v_NY.view(sizes).squeeze(3)))
            hidden_NH = head.leave(_attended(q_NX.view(sizes), rows).flatten(0, 1), residual_NH)
            yield hidden_NH.view(num_texts, length, -1)

    def loss(self, batch: Batch) -> Tensor:
        head, is_place_SL, taught = self._head(), begins(batch), Taught(self._shared, batch)
        total = torch.zeros((), device=is_place_SL.device)
        for step, hidden_SLH in enumerate(self._chains(batch)):
            is_asked_SL = is_place_SL & taught.is_known(2 + step)
            logits_PD = head.logits(hidden_SLH[is_asked_SL], _no_head)
            total = total + LATER_COUNTS_LESS**step * taught.loss(logits_PD, 2 + step, is_asked_SL)
        return total

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """How far the likeliest chain goes; a tree goes further."""
        num_accepted, num_places = torch.zeros(Drafting.depth), 0
        for batch in batches:
            head, is_place_SL = self._head(), begins(batch, Drafting.depth)
            is_right = [
                head.token_ids(head.logits(hidden_SLH[is_place_SL], _no_head).argmax(1))
                == later(batch.token_ids, 2 + step, fill=0)[is_place_SL]
                for step, hidden_SLH in enumerate(self._chains(batch))
            ]
            found_PC = torch.stack(is_right, 1).int().cumprod(1)
            num_accepted += found_PC.sum(0).cpu()
            num_places += len(found_PC)
        return (num_accepted / max(1, num_places)).tolist()

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        tensors = {_published(name): getattr(self, place) for name, place in self._places.items()}
        tensors[DRAFT_TOKENS] = self._shared.token_ids_D
        write_head(folder, WEIGHTS_FILE, tensors, {**self._values, **facts})


def _attended(q_SLKGD: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the last step's queries: to step 0's rows as far as their own token, and to their own chain's later ones.

    rows: of each step its keys and values, [S, L, K, D] each. -> [S, L, X]
    """
    (k_SLKD, v_SLKD), length = rows[0], q_SLKGD.shape[1]
    is_later_LL = torch.ones(length, length, dtype=torch.bool, device=q_SLKGD.device).triu(1)
    q_SLKGD = q_SLKGD * q_SLKGD.shape[-1] ** -0.5
    scores = [torch.einsum("slkgd,smkd->skglm", q_SLKGD, k_SLKD).masked_fill(is_later_LL, float("-inf"))]
    scores += [torch.einsum("slkgd,slkd->skgl", q_SLKGD, keys)[..., None] for keys, _ in rows[1:]]
    weights = torch.cat(scores, -1).softmax(-1)
    attended_SLKGD = torch.einsum("skglm,smkd->slkgd", weights[..., :length], v_SLKD)
    for step, (_, values) in enumerate(rows[1:]):
        attended_SLKGD = attended_SLKGD + torch.einsum("skgl,slkd->slkgd", weights[..., length + step], values)
    return attended_SLKGD.flatten(2)


def _no_head(hidden: Tensor) -> Tensor:
    raise AssertionError("EAGLE-3 speaks by rows of its own")


def _published(name: str) -> str:
    return f"midlayer.{name}" if name.startswith(OF_LAYER) else name
