"""quantize_model(): a model in, a checkpoint out, a decoder block at a time; a killed run does nothing twice."""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import __version__
from slipstream.build.capture import Captured
from slipstream.checkpoint import Source, open_checkpoint, resolve
from slipstream.checkpoint.export import check_hugging_face, save_hugging_face
from slipstream.checkpoint.folder import FORMAT, Checkpoint, check_new_folder
from slipstream.checkpoint.kv_cache import KVCache
from slipstream.checkpoint.layouts import renamed
from slipstream.engine.tensor_file import TensorFile, write_tensor_file
from slipstream.errors import ModelError
from slipstream.kernels.linear.parts import dense_weight
from slipstream.quantize.blocks import BlockQuantizer, Quantized, kv_rounded, kv_scales, rounding_of
from slipstream.quantize.compare import TEXTS_AT_ONCE, Judge
from slipstream.quantize.names import DEFAULT_EXCLUDE, quantized_names
from slipstream.quantize.qformats import QFormat, qformat_of
from slipstream.quantize.quality import Quality
from slipstream.quantize.search import choose_formats
from slipstream.quantize.stream import Block, Rounding, Stream, captured_graph
from slipstream.quantize.texts import Texts
from slipstream.schema.build import KV_DTYPES
from slipstream.schema.format import QUANTIZES_ACTIVATIONS, WeightFormat

Progress = Callable[[str, int, int], None]
CPU = torch.device("cpu")
SEARCH_TEXTS = 2  # the first chunk, on which a block is run for each candidate of a scale


@dataclass(frozen=True, kw_only=True)
class Settings:
    qformat: str
    kv_cache_dtype: str = "auto"  # fp8, int8, or the model's own
    kv_skip_layers: Sequence[int] = ()  # that keep the model's own all the same
    group_size: int = 128
    exclude: Sequence[str] = DEFAULT_EXCLUDE
    desc_act: bool = False  # GPTQ's act-order
    bits: float | None = None  # a weight, on average: some keep more than the format has (quantize/search.py)
    seed: int = 0

    @property
    def method(self) -> QFormat:
        """Raises ModelError for what does not go together."""
        found = qformat_of(self.qformat).with_group_size(self.group_size)
        return found.with_act_order() if self.desc_act else found


@dataclass(frozen=True)
class Result:
    quality: Quality
    num_bytes: int
    reference_num_bytes: int
    num_by_kind: dict[str, int]  # weights that are quantized, by the kind of their format


class WorkFolder:
    """What is done of a quantization, beside its output until that is whole: a file a block."""

    def __init__(self, output_dir: Path, digest: str) -> None:
        self.path = output_dir.with_name(output_dir.name + ".partial")
        self._state = self.path / "state.json"
        self._digest = digest
        if self._read_state().get("digest") != digest:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def num_done(self) -> int:
        return int(self._read_state().get("blocks", 0))

    def once(self, choose: Callable[[], dict[str, WeightFormat]]) -> dict[str, WeightFormat]:
        """What was chosen by the run that began this folder."""
        chosen = self._read_state().get("formats")
        if chosen is not None:
            return {name: WeightFormat.from_dict(value, str(self.path)) for name, value in chosen.items()}
        formats = choose()
        self._write_state({"blocks": 0, "formats": {name: format.to_dict() for name, format in formats.items()}})
        return formats

    def save(self, index: int, found: Quantized) -> None:
        tensors = {f"{name}.{part}": tensor for name, parts in found.parts.items() for part, tensor in parts.items()}
        tensors |= found.changed
        if found.kv_amax_PK is not None:
            tensors["kv_amax"] = found.kv_amax_PK.cpu()
        tensors["nothing"] = torch.zeros(1)  # a file has at least one
        entries = [
            (name, tensor.shape, tensor.dtype, lambda tensor=tensor: tensor.cpu()) for name, tensor in tensors.items()
        ]
        formats = {name: json.dumps(format.to_dict()) for name, format in found.formats.items()}
        write_tensor_file(self._file(index), entries, {"format": "pt", **formats})
        self._write_state({"blocks": index + 1})

    def read(self, index: int) -> Quantized:
        """Tensors are views of the file, which may be removed meanwhile."""
        file = TensorFile.open(self._file(index))
        formats = {
            name: WeightFormat.from_dict(json.loads(value), str(self.path))
            for name, value in file.metadata.items()
            if name != "format"
        }
        parts = {
            name: {part: file.read(f"{name}.{part}") for part in _parts_of(format)} for name, format in formats.items()
        }
        hidden = {f"{name}.{part}" for name in parts for part in parts[name]} | {"nothing", "kv_amax"}
        changed = {name: file.read(name) for name in file.names() if name not in hidden}
        kv_amax = file.read("kv_amax") if "kv_amax" in file.names() else None
        return Quantized(parts, formats, changed, kv_amax)

    def new_folder(self) -> Path:
        """For all of it together, until that is whole."""
        folder = self.path / "made"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.path / f"block-{index:04}.safetensors"

    def _write_state(self, changes: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        state = self._state.with_suffix(".new")
        state.write_text(json.dumps(self._read_state() | {"digest": self._digest} | changes))
        state.replace(self._state)

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


def _parts_of(format: WeightFormat) -> list[str]:
    return list(format.parts(1, 1))


class Overlay:
    """A TensorSource: a checkpoint's weights by our names, some of them replaced."""

    def __init__(self, checkpoint: Checkpoint, blocks: Sequence[Quantized]) -> None:
        self._checkpoint = checkpoint
        self._made = {name: tensor for each in blocks for name, tensor in each.changed.items()}
        for each in blocks:
            for name, parts in each.parts.items():
                self._made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        self._packed = {name: (each.formats[name], each.parts[name]) for each in blocks for name in each.parts}

    def names(self) -> list[str]:
        return list(self._checkpoint.recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._made[name].shape) if name in self._made else self._checkpoint.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._made[name].dtype if name in self._made else self._checkpoint.dtype_of(name)

    def read(self, name: str) -> Tensor:
        if name in self._packed:
            format, parts = self._packed[name]
            return dense_weight(format, parts, self._checkpoint.shapes[name][-1])
        return self._made[name] if name in self._made else self._checkpoint.read(name)

    def close(self) -> None:
        self._checkpoint.close()


class Quantization:
    """One run over a checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, captured: Captured, formats: Mapping[str, WeightFormat], texts: Texts,
        settings: Settings, device: torch.device,
    ) -> None:  # fmt: skip
        qformat = settings.method
        uses_text = qformat.uses_text or settings.kv_cache_dtype in KV_DTYPES  # whose scales it finds
        held_out = texts.held_out.split(TEXTS_AT_ONCE)
        searched, others = texts.calibration[:SEARCH_TEXTS], texts.calibration[SEARCH_TEXTS:].split(TEXTS_AT_ONCE)
        calibration = [chunk for chunk in (searched, *others) if uses_text and len(chunk)]
        self._device, self._kv_dtype = device, KV_DTYPES.get(settings.kv_cache_dtype)
        self._kv_skip_layers = settings.kv_skip_layers
        self._kv_shape = checkpoint.config.kv_planes, checkpoint.config.num_kv_heads
        self._reference = Stream(checkpoint, captured, held_out, device)
        self._stream = Stream(checkpoint, captured, [*held_out, *calibration], device)
        chunks = range(len(held_out), len(held_out) + len(calibration))
        self._quantizer = BlockQuantizer(qformat, self._stream, chunks, formats, checkpoint.dtype)
        self._judge = Judge(held_out, self._stream, self._reference)

    @property
    def quality(self) -> Quality:
        """Of the blocks that were run."""
        return self._judge.quality

    @property
    def blocks(self) -> Sequence[Block]:
        return self._stream.blocks

    def run(self, work: WorkFolder, progress: Progress) -> Iterator[Quantized]:
        """Each block's result, written to the work folder before it is given."""
        num_done = work.num_done
        for index, block in enumerate(self.blocks):
            progress("quantize", index, len(self.blocks))
            weights = self._stream.weights(block)
            is_last = block is self.blocks[-1]
            reference = dict(weights) if is_last else {}  # of a layer, a second copy would be gigabytes
            if not is_last:
                self._reference.advance(block, weights)
            if index < num_done:
                found = work.read(index)
                weights |= {name: tensor.to(self._device).float() for name, tensor in found.changed.items()}
                weights |= {
                    name: dense_weight(found.formats[name], parts, weights[name].shape[-1]).to(self._device)
                    for name, parts in found.parts.items()
                }
            else:
                found = self._quantizer.run(block, weights)
                work.save(index, found)
                found = work.read(index)
            kv_dtype = None if block.layer in self._kv_skip_layers else self._kv_dtype
            roundings = self._roundings(found, block.layer, kv_dtype)
            if is_last:
                self._judge.last((block, block), weights, reference, roundings)
            else:
                self._stream.advance(block, weights, roundings)
                self._judge.after(block)
            yield found

    def _roundings(self, found: Quantized, layer: int, kv_dtype: str | None) -> dict[str, Rounding]:
        roundings = {
            name: rounding_of(format) for name, format in found.formats.items() if format.kind in QUANTIZES_ACTIVATIONS
        }
        if kv_dtype is not None:
            amax_PK = found.kv_amax_PK
            scales_PK = torch.ones(self._kv_shape) if amax_PK is None else kv_scales(amax_PK, kv_dtype)
            roundings[f"kv.{layer}"] = partial(kv_rounded, scales_PK=scales_PK, dtype=kv_dtype)
        return roundings


def quantize_model(
    model: str | Path,
    output_dir: str | Path,
    texts_of: Callable[[Checkpoint], Texts],
    settings: Settings,
    *,
    dtype: str = "auto",
    export_format: str = "slipstream",
    device: torch.device = CPU,
    progress: Progress = lambda stage, done, total: None,
    describe: Callable[[Path, Result], None] = lambda folder, result: None,
) -> Result:
    """Write a model as a quantized checkpoint. Raises ModelError for what cannot be.

    texts_of: what to calibrate with and to judge by, for the model that was opened.
    export_format: slipstream, or hf for a Hugging Face folder.
    describe: writes what is to lie beside the weights.
    """
    if export_format not in ("slipstream", "hf"):
        raise ModelError(f"--export_format is {export_format!r}; it must be slipstream or hf.")
    output = Path(output_dir)
    source = resolve(model)
    if source.path.resolve() == output.resolve():
        raise ModelError(f"{output_dir} is the model to quantize itself; give another --output_dir.")
    if export_format == "slipstream":
        check_new_folder(output, FORMAT)
    elif output.exists() and any(output.iterdir()):
        raise ModelError(f"{output_dir} is not empty; give an --output_dir that is new or empty.")
    qformat = settings.method
    checkpoint = open_checkpoint(source, dtype)
    if checkpoint.formats:
        raise ModelError(f"{model} is quantized already; give the model that it was made of.")
    _check_skipped(settings, checkpoint.config.num_layers)
    texts = texts_of(checkpoint)
    _check_kv_cache(settings, checkpoint, texts)
    if qformat.needs_text and not len(texts.calibration):
        raise ModelError(f"qformat {settings.qformat} needs text to calibrate with; give a --calib_size above 0.")
    with torch.inference_mode():
        work, captured = WorkFolder(output, _digest(source, checkpoint, texts, settings)), captured_graph(checkpoint)
        formats = work.once(lambda: _formats(checkpoint, captured, qformat, texts, settings, device, progress))
        if export_format == "hf":
            check_hugging_face(checkpoint, formats, qformat.layout)
        run = Quantization(checkpoint, captured, formats, texts, settings, device)
        blocks = list(run.run(work, progress))
    made = _quantized(checkpoint, blocks, settings)
    total = made.num_bytes
    kinds = Counter(format.kind for format in made.formats.values())
    result = Result(run.quality, total, checkpoint.num_bytes, dict(sorted(kinds.items())))
    written = 0

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("convert", written, total)

    whole = work.new_folder()
    if export_format == "hf":
        save_hugging_face(made, whole, count, expected=qformat.layout)
    else:
        made.save(whole, count)
    made.close()
    describe(whole, result)
    _put(whole, output)
    work.remove()
    return result


def _put(whole: Path, output: Path) -> None:
    """All at once; or over the checkpoint that was there, whose own files go, and config.json comes last."""
    with contextlib.suppress(OSError):  # it is not empty, or on another disk
        whole.rename(output)
        return
    try:
        output.mkdir(exist_ok=True)
        (output / "config.json").unlink(missing_ok=True)
        for path in sorted(whole.iterdir(), key=lambda path: path.name == "config.json"):
            there = output / path.name
            if there.is_dir():
                shutil.rmtree(there)
            shutil.move(path, there)
    except OSError as error:
        raise ModelError(f"{output} cannot be written ({error.strerror}); give another --output_dir.") from None


def _check_skipped(settings: Settings, num_layers: int) -> None:
    skipped = settings.kv_skip_layers
    if skipped and settings.kv_cache_dtype not in KV_DTYPES:
        raise ModelError(
            "--kv_cache_dtype_skip_layers are left out of a KV cache in 8 bits; give --kv_cache_dtype "
            f"{' or '.join(KV_DTYPES)}, too."
        )
    wrong = next((layer for layer in skipped if not 0 <= layer < num_layers), None)
    if wrong is not None or set(skipped) >= set(range(num_layers)):
        what = "all layers" if wrong is None else f"layer {wrong}"
        raise ModelError(
            f"--kv_cache_dtype_skip_layers names {what}; the model has layers 0 to {num_layers - 1}, and one at least "
            "is kept in 8 bits."
        )


def _check_kv_cache(settings: Settings, checkpoint: Checkpoint, texts: Texts) -> None:
    if settings.kv_cache_dtype not in KV_DTYPES:
        checkpoint.kv_cache.chosen(settings.kv_cache_dtype, checkpoint.dtype, checkpoint.name)
    elif settings.kv_cache_dtype != "fp8" and not len(texts.calibration):
        raise ModelError(
            f"A KV cache in {settings.kv_cache_dtype} needs text to calibrate with; give a --calib_size above 0, or "
            "--kv_cache_dtype fp8, which has scales of 1 without."
        )


def _formats(
    checkpoint: Checkpoint, captured: Captured, qformat: QFormat, texts: Texts, settings: Settings,
    device: torch.device, progress: Progress,
) -> dict[str, WeightFormat]:  # fmt: skip
    """Of each weight that is quantized."""
    if qformat.format is None:
        return {}
    names = quantized_names(captured.graph, settings.exclude)
    if settings.bits is None:
        return dict.fromkeys(sorted(names), qformat.format)
    if qformat.format.kind != "w4a16":
        raise ModelError(
            f"--auto_quantize_bits goes with int4_awq, int4_gptq or int4_wo, not with qformat {settings.qformat}."
        )
    if not len(texts.calibration):
        raise ModelError("--auto_quantize_bits needs text to measure with; give a --calib_size above 0.")
    return choose_formats(
        checkpoint, captured, names, qformat.format, settings.bits, texts.calibration[:1], device, progress
    )


def _quantized(checkpoint: Checkpoint, blocks: Sequence[Quantized], settings: Settings) -> Checkpoint:
    formats = {name: format for each in blocks for name, format in each.formats.items()}
    return replace(
        checkpoint,
        weights=Overlay(checkpoint, blocks),
        recipes={name: renamed(name, checkpoint.shapes[name]) for name in checkpoint.recipes},
        formats=formats,
        kv_cache=_kv_cache(checkpoint, blocks, settings),
    )


def _kv_cache(checkpoint: Checkpoint, blocks: Sequence[Quantized], settings: Settings) -> KVCache:
    kv_dtype = KV_DTYPES.get(settings.kv_cache_dtype)
    found = [each.kv_amax_PK for each in blocks if each.kv_amax_PK is not None]
    if kv_dtype is None or not found:
        return checkpoint.kv_cache.chosen(settings.kv_cache_dtype, checkpoint.dtype, checkpoint.name)
    scales = {
        layer: kv_scales(amax_PK, kv_dtype)
        for layer, amax_PK in enumerate(found)
        if layer not in settings.kv_skip_layers
    }
    return KVCache(kv_dtype, scales, settings.kv_skip_layers)


def _digest(source: Source, checkpoint: Checkpoint, texts: Texts, settings: Settings) -> str:
    what = [__version__, source.fingerprint(), checkpoint.dtype, texts.digest, asdict(settings)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
