"""Opening any model as a Checkpoint: rename by the model's table, and prove that nothing is missing or left over."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slipstream.checkpoint.export import save_hugging_face
from slipstream.checkpoint.folder import FORMAT, TOKENIZER_FOLDER, VERSION, WEIGHTS_FILE, Checkpoint
from slipstream.checkpoint.gguf import GGUFModel
from slipstream.checkpoint.kv_cache import KVCache
from slipstream.checkpoint.layouts import Recipe, Shapes, from_hugging_face, pattern, renamed
from slipstream.checkpoint.own_model import OwnModel
from slipstream.checkpoint.packed import PackedTensors, open_packed
from slipstream.checkpoint.quantized import LAYOUTS, open_quantized
from slipstream.checkpoint.shared import KEY as SHARES
from slipstream.checkpoint.shared import LENT, Shares, WithShared, read_shares
from slipstream.checkpoint.source import Source, lender_of, resolve
from slipstream.checkpoint.tensors import ShardedTensors, TensorSource
from slipstream.checkpoint.tokenizer_files import copy_tokenizer, write_gguf_tokenizer
from slipstream.checkpoint.trtllm import is_tensorrt_llm, open_tensorrt_llm
from slipstream.engine.bounded_json import read_json
from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import CorruptFile, ModelError
from slipstream.models import ModelFile, read_config
from slipstream.schema.build import DTYPES, KV_DTYPES
from slipstream.schema.format import WeightFormat
from slipstream.schema.model import DecoderConfig
from slipstream.schema.weights import WeightTable

OWN_BITS = "gguf"  # a quantization that is none
OUTPUT_FORMATS = ("slipstream", "hf", *LAYOUTS)


def convert(
    model: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    output_format: str = "slipstream",
    own_model: OwnModel | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> None:
    """Write a model as a checkpoint folder. dtype "auto" keeps the dtype the model was published in.

    kv_cache_dtype: how its engines keep keys and values: fp8, int8 or the dtype; "auto" is what the model says.
    output_format: slipstream, or hf for a Hugging Face folder, in which packed weights are stored as their kind mostly
    is; or the name of a layout of these: awq, compressed-tensors, fp8, gptq.
    own_model: the user's own model file, for an architecture that is not one of ours.
    """
    if output_format not in OUTPUT_FORMATS:
        raise ModelError(f"output_format is {output_format!r}; it must be {', '.join(OUTPUT_FORMATS)}.")
    source = resolve(model, own_model)
    if source.path.resolve() == Path(output_dir).resolve():
        raise ModelError(f"{output_dir} is the model to convert itself; give another --output_dir.")
    checkpoint = open_checkpoint(source, dtype)
    kv_cache = checkpoint.kv_cache.chosen(kv_cache_dtype, checkpoint.dtype, checkpoint.name)
    checkpoint = replace(checkpoint, kv_cache=kv_cache)
    written, total = 0, checkpoint.num_bytes

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("convert", written, total)

    try:
        if output_format == "slipstream":
            checkpoint.save(Path(output_dir), count)
        else:
            layout = "" if output_format == "hf" else output_format
            save_hugging_face(checkpoint, Path(output_dir), count, layout=layout)
    finally:
        checkpoint.close()


def open_checkpoint(source: Source, dtype: str = "auto") -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or a checkpoint folder; no weight is read yet."""
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
    if source.kind == "checkpoint":
        return _open_ours(source, dtype)
    if source.kind == "gguf":
        gguf = GGUFModel.open(source.path)
        return _open(
            source, gguf, gguf.hf_config(), gguf.generation_config(), dtype,
            lambda folder: write_gguf_tokenizer(gguf.tokenizer_facts(), folder), gguf.weights,
        )  # fmt: skip
    if source.kind == "folder":
        generation_path = source.path / "generation_config.json"
        generation = read_json(generation_path) if generation_path.is_file() else {}
        options = read_json(source.path / "config.json")
        shares = read_shares(options, f"{source.path}/config.json")
        tensors: TensorSource
        weights: WeightTable | None = None
        if is_tensorrt_llm(source.path, options):
            options, tensors, weights = open_tensorrt_llm(source.path, options)
        else:
            tensors = _open_folder(source.path, options)
        options.pop("quantization_config", None)
        options.pop(SHARES, None)
        return _open(
            source, tensors, options, generation, dtype, lambda folder: copy_tokenizer(source.path, folder), weights,
            shares,
        )  # fmt: skip
    raise ModelError(f"{source.path} is an engine already; give a model folder or a .gguf file to convert.")


def _open_folder(folder: Path, options: dict[str, Any]) -> TensorSource:
    tensors = ShardedTensors.open(folder)
    try:
        return open_quantized(folder, options, tensors) or tensors
    except BaseException:
        tensors.close()
        raise


def _open(
    source: Source,
    tensors: TensorSource,
    options: dict[str, Any],
    generation: dict[str, Any],
    dtype: str,
    write_tokenizer: Callable[[Path], None],
    weights: WeightTable | None = None,
    shares: Shares | None = None,
) -> Checkpoint:
    """weights: what the source calls them, where that is not what Hugging Face does."""
    lent = () if shares is None else shares.weights
    try:
        own = _own(source)
        model, config = read_config(options, str(source.path), own)
        table = weights or model.WEIGHTS
        if not config.tie_word_embeddings and "lm_head.weight" not in lent and _lacks_its_head(table, tensors.names()):
            warnings.warn(f"{source.path} has no head: it is for embeddings, its texts mean nothing.", stacklevel=2)
            options = options | {"tie_word_embeddings": True}
            model, config = read_config(options, str(source.path), own)
        shapes = shapes_of(model, config, source.path)
        recipes = find_weights(model, table, config, shapes, tensors.names(), source.path)
        formats, kv_cache = formats_of(recipes, tensors), kv_cache_of(tensors, config, source.path)
        if shares is not None:
            recipes |= _lent(shares, recipes, shapes, source.path)
            tensors, write_tokenizer = _with_lender(shares, tensors, source.path)
        check_shapes(shapes, recipes, tensors, source.path)
    except BaseException:
        tensors.close()
        raise
    if dtype == "auto":
        dtype = published_dtype(options)
    generation = {"eos_token_id": options.get("eos_token_id"), "bos_token_id": options.get("bos_token_id")} | generation
    generation["eos_token_id"] = _known_ends(generation["eos_token_id"], config.vocab_size, source)
    return Checkpoint(
        source.name, options, config, model, dtype, generation, tensors, shapes, recipes, write_tokenizer, formats,
        kv_cache, shares,
    )  # fmt: skip


def _lent(shares: Shares, recipes: dict[str, Recipe], shapes: Shapes, where: Path) -> dict[str, Recipe]:
    twice = next((name for name in shares.weights if name in recipes), None)
    if twice is not None:
        raise CorruptFile(f"{where} holds {twice}, and shares it with {shares.model}; it can do one of the two.")
    return {name: renamed(f"{LENT}{name}", shapes.get(name, ())) for name in shares.weights}


def _with_lender(shares: Shares, own: TensorSource, where: Path) -> tuple[TensorSource, Callable[[Path], None]]:
    """The tensors of both; and the tokenizer, which is the lender's."""
    lender = open_checkpoint(lender_of(shares, where), "float32")
    if not set(shares.weights) <= lender.shapes.keys():
        lender.close()
        raise CorruptFile(f"{where} shares weights with {shares.model}, which does not have them: {shares.weights}.")
    return WithShared(own, lender), lender.write_tokenizer


def _known_ends(value: Any, vocab_size: int, source: Source) -> Any:
    """Small models of a large one's config name ends of text that their vocabulary does not reach."""
    values = value if isinstance(value, list) else [value]
    beyond = [each for each in values if type(each) is int and each >= vocab_size]
    if not beyond:
        return value
    named = ", ".join(map(str, beyond))
    warnings.warn(f"{source.path}: eos_token_id {named} is not in the vocabulary of {vocab_size} and ends no text.",
                  stacklevel=3)  # fmt: skip
    return [each for each in values if each not in beyond]


def _open_ours(source: Source, dtype: str) -> Checkpoint:
    description = read_json(source.path / "config.json")
    if description.get("version") != VERSION or description.get("format") != FORMAT:
        raise ModelError(
            f"{source.path} is version {description.get('version')!r} of {FORMAT}, this is {VERSION}; convert it again."
        )
    options, generation = description.get("model"), description.get("generation")
    if not isinstance(options, dict) or not isinstance(generation, dict):
        raise CorruptFile(f"{source.path}/config.json: model and generation must be objects.")
    model, config = read_config(options, f"{source.path}/config.json", _own(source))
    stored = description.get("dtype")
    if not isinstance(stored, str) or stored not in DTYPES:
        raise CorruptFile(f"{source.path}/config.json: dtype is {stored!r}; it must be one of {', '.join(DTYPES)}.")
    tokenizer, shares = source.path / TOKENIZER_FOLDER, read_shares(description, f"{source.path}/config.json")
    tensors: TensorSource = TensorFile.open(source.path / WEIGHTS_FILE)
    write_tokenizer: Callable[[Path], None] = lambda folder: copy_tokenizer(tokenizer, folder)  # noqa: E731
    try:
        shapes = shapes_of(model, config, source.path)
        tensors = _open_parts(tensors, description, shapes, source.path)
        recipes = {name: renamed(name, shapes.get(name, ())) for name in tensors.names()}
        formats, kv_cache = formats_of(recipes, tensors), kv_cache_of(tensors, config, source.path)
        if shares is not None:
            recipes |= _lent(shares, recipes, shapes, source.path)
            tensors, write_tokenizer = _with_lender(shares, tensors, source.path)
        check_shapes(shapes, recipes, tensors, source.path)
    except BaseException:
        tensors.close()
        raise
    return Checkpoint(
        str(description.get("name", source.name))[:256], options, config, model, stored if dtype == "auto" else dtype,
        generation, tensors, shapes, recipes, write_tokenizer, formats, kv_cache, shares,
    )  # fmt: skip


def _open_parts(tensors: TensorSource, description: dict[str, Any], shapes: Shapes, where: Path) -> TensorSource:
    """The packed weights that config.json lists, and the scales of a KV cache in 8 bits."""
    entries, kv_dtype = description.get("formats", {}), description.get("kv_dtype", "")
    if kv_dtype not in ("", *KV_DTYPES.values()):
        known = ", ".join(KV_DTYPES.values())
        raise CorruptFile(f"{where}/config.json: kv_dtype is {kv_dtype!r}; it must be one of {known}, or empty.")
    skipped = description.get("kv_skip_layers", [])
    if not isinstance(skipped, list) or not all(type(layer) is int for layer in skipped):
        raise CorruptFile(f"{where}/config.json: kv_skip_layers is {str(skipped)[:80]!r}; it must be layers.")
    if not isinstance(entries, dict):
        raise CorruptFile(f"{where}/config.json: formats is {str(entries)[:80]!r}; it must be an object.")
    if not entries and not kv_dtype:
        return tensors
    formats = {name: WeightFormat.from_dict(values, f"{where}/config.json") for name, values in entries.items()}
    return open_packed(tensors, formats, shapes, kv_dtype, skipped, str(where))


def formats_of(recipes: dict[str, Recipe], tensors: TensorSource) -> dict[str, WeightFormat]:
    """Our names of the weights that stay packed: those that are theirs, or rows of theirs. Others are dequantized."""
    if not isinstance(tensors, PackedTensors):
        return {}
    formats: dict[str, WeightFormat] = {}
    dequantized = []
    for ours, recipe in recipes.items():
        found = {tensors.format_of(source) for source in recipe.sources}
        format = found.pop() if len(found) == 1 and recipe.takes_rows else None
        if format is not None:
            formats[ours] = format
        elif found - {None}:
            dequantized.append(ours)
    if dequantized:
        more = f" and {len(dequantized) - 1} more" if len(dequantized) > 1 else ""
        warnings.warn(
            f"{dequantized[0]}{more} are dequantized: their parts differ in format, or are stored transposed.",
            stacklevel=2,
        )
    return formats


def in_own_bits(checkpoint: Checkpoint) -> Checkpoint:
    """A GGUF file whose products keep its numbers, where we have a format for them; the others are dequantized."""
    if not isinstance(checkpoint.weights, GGUFModel):
        raise ModelError(f"{checkpoint.name} is no GGUF file; quantization {OWN_BITS} is for these.")
    weights = checkpoint.weights.packed()
    return replace(checkpoint, weights=weights, formats=formats_of(checkpoint.recipes, weights))


def kv_cache_of(tensors: TensorSource, config: DecoderConfig, where: Path) -> KVCache:
    return tensors.kv_cache.of_model(config, str(where)) if isinstance(tensors, PackedTensors) else KVCache()


def _own(source: Source) -> ModelFile | None:
    return None if source.own_model is None else source.own_model.load()


def published_dtype(options: dict[str, Any]) -> str:
    named = options.get("dtype", options.get("torch_dtype"))
    return named if named in DTYPES else "float32"


def shapes_of(model: ModelFile, config: DecoderConfig, where: Path) -> Shapes:
    """Of every parameter of the model, by name. Nothing is allocated."""
    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in model.Model(config).named_parameters()}
    except RuntimeError:  # torch multiplies the sizes out even where it stores nothing
        raise CorruptFile(f"{where}: the config asks for tensors larger than any memory.") from None


def find_weights(
    model: ModelFile, weights: WeightTable, config: DecoderConfig, shapes: Shapes, found: Iterable[str], where: Path
) -> dict[str, Recipe]:
    """How each of our weights is made of the source's tensors; a name that no line of `weights` knows is an error."""
    found, ignored_names = list(found), model.IGNORED_WEIGHTS
    if _is_body(weights, found):
        prefix = _prefix(weights)
        weights = {name.removeprefix(prefix): layout for name, layout in weights.items()}
        ignored_names = tuple(name.removeprefix(prefix) for name in ignored_names)
    ignored = [pattern(name) for name in ignored_names]
    found = [name for name in found if not any(each.fullmatch(name) for each in ignored)]
    recipes, left_over = from_hugging_face(weights, config, shapes, found, str(where))
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise CorruptFile(f"{where} holds the tensor {left_over[0]}{more}, which this model does not have.")
    if config.tie_word_embeddings:
        recipes.pop("lm_head.weight", None)
    return recipes


def _is_body(weights: WeightTable, found: Iterable[str]) -> bool:
    """Whether the names are those that AutoModel saves, as of the first GPT-2 and of models for embeddings: a model
    without its head, in which nothing is "model."."""
    return not any(name.startswith(_prefix(weights)) for name in found)


def _prefix(weights: WeightTable) -> str:
    """What the names of all but the head begin with; tables begin with the embedding."""
    return next(iter(weights), "").partition(".")[0] + "."


def _lacks_its_head(weights: WeightTable, found: Iterable[str]) -> bool:
    """A body, with no head beside it."""
    heads, names = {name for name, layout in weights.items() if layout == "lm_head.weight"}, set(found)
    return _is_body(weights, names) and not heads & names


def check_shapes(shapes: Shapes, recipes: dict[str, Recipe], tensors: TensorSource, where: Path) -> None:
    """Raise CorruptFile unless the tensors are exactly the model's parameters."""
    for name, shape in shapes.items():
        if name not in recipes:
            raise CorruptFile(f"{where} lacks the tensor for {name} {list(shape)}.")
        recipe = recipes[name]
        for source in recipe.sources:
            actual = tensors.shape(source)
            if actual != recipe.source_shape:
                expected = list(recipe.source_shape)
                raise CorruptFile(f"{where}: {source} is {list(actual)}; its config asks for {expected}.")
    for name, recipe in list(recipes.items()):
        if name not in shapes and name.endswith(".bias") and not tensors.read(recipe.sources[0]).any():
            del recipes[name]  # some tools give every linear they quantize a bias
        elif name not in shapes:
            raise CorruptFile(f"{where} holds the tensor {recipe.sources[0]}, which its config has no place for.")
