"""Two models over the same texts, block by block: what one loses against the other."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from slipstream.checkpoint.folder import Checkpoint
from slipstream.errors import ModelError
from slipstream.quantize.blocks import kv_rounded, rounding_of
from slipstream.quantize.quality import Quality
from slipstream.quantize.stream import Block, Rounding, Stream, captured_graph
from slipstream.schema.format import QUANTIZES_ACTIVATIONS

TEXTS_AT_ONCE = 4  # that flow through a block together


class Judge:
    """Of a stream and its reference, whose first chunks are the held-out texts. `quality` grows with the blocks."""

    def __init__(self, held_out: Sequence[Tensor], found: Stream, expected: Stream) -> None:
        self.quality = Quality()
        self._held_out, self._found, self._expected = held_out, found, expected

    def after(self, block: Block) -> None:
        """Both have been advanced by a block; what it made is compared if it is a layer."""
        if block.layer < 0:
            return
        made = {name for node in block.nodes for name in node.outputs}
        names = [name for name in self._found.states[0] if name in made]
        found, expected = (
            torch.cat([stream.states[chunk][name].flatten() for chunk in range(len(self._held_out)) for name in names])
            for stream in (self._found, self._expected)
        )
        self.quality.note_layer(block.layer, found, expected)

    def last(
        self, blocks: tuple[Block, Block], weights: Mapping[str, Tensor], expected_weights: Mapping[str, Tensor],
        roundings: Mapping[str, Rounding] = {}, expected_roundings: Mapping[str, Rounding] = {},
    ) -> None:  # fmt: skip
        """Logits of the last block, of either model."""
        for chunk, token_ids in enumerate(self._held_out):
            found = self._found.run(blocks[0], weights, chunk, roundings=roundings)
            expected = self._expected.run(blocks[1], expected_weights, chunk, roundings=expected_roundings)
            found_TV, expected_TV = found[self._found.graph.outputs[0]], expected[self._expected.graph.outputs[0]]
            self.quality.add(found_TV, expected_TV, token_ids.to(found_TV.device))


def compare(
    model: Checkpoint,
    reference: Checkpoint,
    held_out: Tensor,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Quality:
    """held_out: token ids [texts, length]. Raises ModelError for models of different vocabularies.

    Errors of layers are left out where the models do not have the same ones.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise ModelError(
            f"{model.name} has {model.config.vocab_size} tokens and {reference.name} {reference.config.vocab_size}; "
            "only models of one vocabulary can be compared."
        )
    chunks = held_out.split(TEXTS_AT_ONCE)
    with torch.inference_mode():
        streams = [Stream(each, captured_graph(each), chunks, device) for each in (model, reference)]
        roundings = [roundings_of(each) for each in (model, reference)]
        judge = Judge(chunks, *streams)
        sizes = [(each.config.num_layers, each.config.hidden_size) for each in (model, reference)]
        total = max(len(stream.blocks) for stream in streams)
        for index in range(total - 1):
            progress("evaluate", index, total)
            for stream, rounding in zip(streams, roundings, strict=True):
                if index < len(stream.blocks) - 1:
                    stream.advance(stream.blocks[index], stream.weights(stream.blocks[index]), rounding)
            if sizes[0] == sizes[1]:
                judge.after(streams[0].blocks[index])
        last = streams[0].blocks[-1], streams[1].blocks[-1]
        judge.last(last, streams[0].weights(last[0]), streams[1].weights(last[1]), *roundings)
    return judge.quality


def roundings_of(checkpoint: Checkpoint) -> dict[str, Rounding]:
    """What engines of a checkpoint round as they run: inputs of products, keys and values."""
    found: dict[str, Rounding] = {
        name: rounding_of(format) for name, format in checkpoint.formats.items() if format.kind in QUANTIZES_ACTIVATIONS
    }
    cache = checkpoint.kv_cache
    for layer in cache.layers(checkpoint.config.num_layers):
        shape = checkpoint.config.kv_planes, checkpoint.config.num_kv_heads
        scales_PK = cache.scales.get(layer, torch.ones(shape))
        found[f"kv.{layer}"] = partial(kv_rounded, scales_PK=scales_PK, dtype=cache.dtype)
    return found
