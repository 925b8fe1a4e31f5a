"""A small draft model, trained: some of the target's own layers, which learn to do without the others.

The student is the target's architecture with fewer layers, spread over the depth of the target as they begin; embedding
and output layer stay the target's. What is trained is the graph that a build would capture, run by the ops' references,
which autograd goes through: any architecture that is known here can be shortened. It learns the target's
distribution, as far as that is of likely tokens.

Shape suffixes: S texts, L tokens of the longest, V vocabulary, D tokens whose probabilities are learned, P places of a
batch, N blocks of B tokens, K heads, D numbers of each (of KV), X columns of queries.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slipstream.build.capture import capture
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.layouts import theirs_shape, to_hugging_face
from slipstream.checkpoint.shared import KEY as SHARES
from slipstream.checkpoint.shared import Shares
from slipstream.checkpoint.source import is_name
from slipstream.engine.graph import Node
from slipstream.engine.tensor_file import write_tensor_file
from slipstream.errors import UsageError
from slipstream.kernels.attention.paged import attend_one
from slipstream.kernels.registry import known_ops
from slipstream.models import read_config
from slipstream.speculative.draft_model.drafter import Drafter
from slipstream.speculative.training import Batch, Teacher, begins, most_said, rotated
from slipstream.speculative.training import Student as Base

BLOCK_SIZE = 32  # tokens of a page of the cache, of which each text has its own
MOST_LEARNED = 8192  # tokens, the likeliest of the target's distribution
NAMES_OF_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # in config.json


@dataclass(frozen=True)
class Options:
    num_layers: int = 3


class Student(Base):
    options_type = Options

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher, options)
        self._learned_D = most_said(teacher.counts, MOST_LEARNED).to(teacher.device)
        source, self._target = resolve(teacher.model), teacher.model
        if source.kind == "engine":
            raise UsageError(
                f"--model {teacher.model} is an engine, which is not taken apart; give the model it was built of."
            )
        self._checkpoint = checkpoint = open_checkpoint(source, "float32")
        count = checkpoint.config.num_layers
        if options.num_layers >= count:
            raise UsageError(
                f"--num_layers is {options.num_layers} and {checkpoint.name} has {count}; a draft model has fewer."
            )
        chosen = torch.linspace(0, count - 1, options.num_layers).round().int().tolist()
        self._options = _shortened(checkpoint.options, chosen, count)
        _, self._config = read_config(self._options, checkpoint.name, checkpoint.model)
        captured = capture(checkpoint.model.Model, self._config, "float32", BLOCK_SIZE)
        self._graph, self._ops = captured.graph, known_ops()
        self._constants = {name: tensor.to(teacher.device) for name, tensor in captured.constants.items()}
        self._logits_name, self._hidden_name = self._graph.outputs
        end = 1 + next(index for index, node in enumerate(self._graph.nodes) if self._hidden_name in node.outputs)
        self._layers, self._head = self._graph.nodes[:end], self._graph.nodes[end:]
        of_head = {name for node in self._head for name in node.inputs}  # which the target's logits are made of, too
        self._frozen: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}  # weights' names to parameters', which have no dots
        for name in self._graph.weights:
            if name in self._constants:
                continue
            tensor = checkpoint.read(_of_target(name, chosen)).to(teacher.device, torch.float32, copy=True)
            if name in of_head or (tensor.ndim > 1 and not name.startswith("layers.")):
                self._frozen[name] = tensor
            else:
                self._places[name] = name.replace(".", "__")
                self.register_parameter(self._places[name], nn.Parameter(tensor))

    def _weights(self) -> dict[str, Tensor]:
        return self._frozen | {name: getattr(self, place) for name, place in self._places.items()}

    def _logits(self, token_ids_SL: Tensor, rows_P: Tensor) -> Tensor:
        """[P, V] of these of the S · L tokens."""
        values: dict[str, Any] = {**_step(token_ids_SL), **self._constants, **self._weights()}
        num_blocks = 1 + values["step.block_tables"].numel()
        for name, kind in self._graph.inputs.items():
            if name.startswith("kv."):
                planes, _, *sizes = kind.shape
                values[name] = torch.zeros(planes, num_blocks, *sizes, device=token_ids_SL.device)  # type: ignore[arg-type]
        self._compute(self._layers, values)
        return self._said(values[self._hidden_name][rows_P])

    def _said(self, hidden_PH: Tensor) -> Tensor:
        """[P, V] the logits of what the head reads, in the target or here."""
        values: dict[str, Any] = {self._hidden_name: hidden_PH, **self._constants, **self._weights()}
        self._compute(self._head, values)
        found: Tensor = values[self._logits_name]
        return found

    def _compute(self, nodes: Sequence[Node], values: dict[str, Any]) -> None:
        for node in nodes:
            inputs: list[Any] = [None if name is None else values[name] for name in node.inputs]
            if node.op == "kv_write":
                values[str(node.inputs[2])] = _written(*inputs[:4])
                continue
            op = self._ops[node.op]
            attributes = [node.attributes[argument.name] for argument in op.attributes]
            many = any(argument.kind == "Tensor[]" for argument in op.arguments)
            function = IN_TRAINING.get(node.op, op.reference)
            made = function(*([inputs] if many else inputs), *attributes)
            values.update(zip(node.outputs, made if isinstance(made, tuple | list) else (made,), strict=True))

    def loss(self, batch: Batch) -> Tensor:
        assert batch.hidden is not None
        rows_P = begins(batch).flatten().nonzero()[:, 0]
        with torch.no_grad():  # what the model held likely there
            likely_PD = self._said(batch.hidden.flatten(0, 1)[rows_P])[:, self._learned_D].softmax(1)
        said_PV = self._logits(batch.token_ids, rows_P).log_softmax(1)
        return -(likely_PD * said_PV[:, self._learned_D]).sum() / max(1, len(rows_P))

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """Drafts go on from right drafts only, so what is right at each place of the text says how far they come."""
        length = Drafter.default_draft_len
        num_accepted, num_places = torch.zeros(length), 0
        for batch in batches:
            rows_P = torch.arange(batch.token_ids.numel(), device=batch.token_ids.device)
            said_SL = self._logits(batch.token_ids, rows_P).argmax(dim=1).view_as(batch.token_ids)
            is_right_SL = said_SL[:, :-1] == batch.token_ids[:, 1:]
            windows_SPN = functional.pad(is_right_SL, (0, length)).unfold(1, length, 1)[:, : is_right_SL.shape[1]]
            is_place_SL = functional.pad(batch.is_answer, (0, length))[:, length:] & batch.is_answer
            found_PN = windows_SPN[is_place_SL[:, :-1]].int().cumprod(dim=1)
            num_accepted += found_PN.sum(dim=0).cpu()
            num_places += len(found_PN)
        return (num_accepted / max(1, num_places)).tolist()

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """A Hugging Face folder; what was measured is in training.json beside it.

        Where the target has a name that is good anywhere, what is the target's stays there.
        """
        weights = {name: tensor.detach() for name, tensor in self._weights().items()}
        is_good_anywhere = is_name(self._target) and self._checkpoint.shares is None
        shares = Shares(self._target, tuple(sorted(self._frozen))) if is_good_anywhere else None
        shapes = {name: tuple(each.shape) for name, each in weights.items() if not shares or name not in self._frozen}
        recipes = to_hugging_face(self._checkpoint.model.WEIGHTS, self._config, shapes)
        entries = [
            (
                name, theirs_shape(recipe, shapes), torch.bfloat16,
                lambda recipe=recipe: recipe.make([weights[source] for source in recipe.sources]).bfloat16(),
            )
            for name, recipe in recipes.items()
        ]  # fmt: skip
        write_tensor_file(folder / "model.safetensors", entries, {"format": "pt"})
        if shares is None:
            self._checkpoint.write_tokenizer(folder)
        self._checkpoint.close()
        (folder / "training.json").write_text(json.dumps(dict(facts), indent=1) + "\n")
        if self._checkpoint.generation:
            (folder / "generation_config.json").write_text(json.dumps(self._checkpoint.generation, indent=1) + "\n")
        options = self._options | {"dtype": "bfloat16"} | ({SHARES: shares.to_dict()} if shares else {})
        (folder / "config.json").write_text(json.dumps(options, indent=1) + "\n")


def _shortened(options: Mapping[str, Any], chosen: list[int], count: int) -> dict[str, Any]:
    """A config.json with these of its layers; what it says of each layer goes with them."""
    short = {
        name: [value[layer] for layer in chosen] if isinstance(value, list) and len(value) == count else value
        for name, value in options.items()
    }
    return short | {name: len(chosen) for name in NAMES_OF_NUM_LAYERS if options.get(name) == count}


def _of_target(name: str, chosen: list[int]) -> str:
    first, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"layers.{chosen[int(number)]}.{rest}" if first == "layers" else name


def _step(token_ids_SL: Tensor) -> dict[str, Tensor]:
    """The inputs of a step that has whole texts of one length."""
    (num_texts, length), device = token_ids_SL.shape, token_ids_SL.device
    width = -(-length // BLOCK_SIZE)
    tables_SB = 1 + torch.arange(num_texts * width, device=device).view(num_texts, width)
    positions_L = torch.arange(length, device=device)
    slots_SL = tables_SB[:, positions_L // BLOCK_SIZE] * BLOCK_SIZE + positions_L % BLOCK_SIZE
    return {
        "step.token_ids": token_ids_SL.flatten(),
        "step.positions": positions_L.repeat(num_texts),
        "step.slots": slots_SL.flatten(),
        "step.query_starts": torch.arange(num_texts + 1, device=device) * length,
        "step.kv_lens": torch.full((num_texts,), length, device=device),
        "step.block_tables": tables_SB,
        "step.logit_rows": torch.arange(num_texts * length, device=device),
    }


def _attended(
    q_TX: Tensor, kv_PNBKD: Tensor, starts: Tensor, lengths_S: Tensor, tables_SB: Tensor, *rest: Any
) -> Tensor:
    """The op attention's reference, of all texts at once: they are of one length."""
    q_SLX = q_TX.unflatten(0, (len(tables_SB), -1))
    places_L = torch.arange(length := q_SLX.shape[1], device=q_TX.device)
    distances_LL = places_L[:, None] - places_L
    attend = torch.vmap(lambda q_LX, ids_B: attend_one(q_LX, kv_PNBKD, ids_B, length, distances_LL, *rest))
    attended_SLX: Tensor = attend(q_SLX, tables_SB)
    return attended_SLX.flatten(0, 1)


def _written(k_TY: Tensor, v_TY: Tensor | None, kv_PNBKD: Tensor, slots_T: Tensor) -> Tensor:
    """What kv_write does in place, which autograd would not follow."""
    planes = []
    for plane_NBKD, x_TY in zip(kv_PNBKD.unbind(), (k_TY, v_TY), strict=False):
        assert x_TY is not None
        x_TKD = x_TY.unflatten(1, plane_NBKD.shape[2:])
        planes.append(plane_NBKD.flatten(0, 1).index_copy(0, slots_T, x_TKD).view_as(plane_NBKD))
    return torch.stack(planes)


IN_TRAINING: dict[str, Callable[..., Any]] = {
    "rope": rotated,
    "attention": _attended,
}  # autograd follows these
