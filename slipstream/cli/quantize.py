"""slipstream quantize: a model's weights in fewer bits, and what that costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import print_table
from slipstream.errors import UsageError
from slipstream.progress import progress_bar


def quantize(
    model_dir: Annotated[str, typer.Option(help="Hugging Face folder, .gguf file, Hub id or smollm2.")],
    output_dir: Annotated[str, typer.Option(help="Checkpoint folder to write; new, empty, or an older checkpoint.")],
    qformat: Annotated[
        str,
        typer.Option(
            help="fp8, fp8_block, int8, int8_sq (SmoothQuant), int8_wo, int4_wo, int4_awq, int4_gptq, w4a8_awq, "
            "nvfp4 (_wo: weights only), or full_prec."
        ),
    ] = "int4_awq",
    dtype: Annotated[str, typer.Option(help="Of what is not quantized. auto: as published.")] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="How engines keep keys and values: fp8, int8 (scales are calibrated), or the --dtype.")
    ] = "auto",
    kv_cache_dtype_skip_layers: Annotated[
        str, typer.Option(help="Layers whose keys and values keep the --dtype all the same, such as 0,29.")
    ] = "",
    calib_size: Annotated[
        int,
        typer.Option(min=0, help="Texts to calibrate with. 0: none; scales of activations are measured as it runs."),
    ] = 128,
    calib_dataset: Annotated[
        Path | None,
        typer.Option(help="A .txt or .jsonl file of your own.  [default: English and code of Python's own]"),
    ] = None,
    calib_max_seq_length: Annotated[int, typer.Option(min=8, help="Tokens of each of these texts.")] = 512,
    awq_block_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale in int4: 32, 64 or 128.  [default: 128]")
    ] = None,
    desc_act: Annotated[
        bool, typer.Option("--desc_act", help="Of int4_gptq: columns that meet large activations are rounded first.")
    ] = False,
    auto_quantize_bits: Annotated[
        float | None,
        typer.Option(help="Of int4 formats, bits a weight on average, such as 5.0: what suffers most keeps 8, or all."),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None,
        typer.Option(help="Weights to leave as they are, such as layers.0 or down_proj; may be given again."),
    ] = None,
    export_format: Annotated[
        str, typer.Option(help="slipstream: a checkpoint. hf: a Hugging Face folder that other engines load.")
    ] = "slipstream",
    random_seed: Annotated[int, typer.Option("--random_seed", "--seed", help="Chooses the texts.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Quantize a model, one decoder block at a time, and measure what it costs on text that was held out.

    A run that is interrupted goes on where it was when the same command is given again.

    Example:
        slipstream quantize --model_dir smollm2 --qformat int4_awq --output_dir checkpoints/smollm2-awq
    """
    if not output_dir:
        raise UsageError("--output_dir is empty; give a folder, such as checkpoints/mine.")
    from slipstream.quantize import quantize as quantize_model
    from slipstream.quantize.apply import Settings
    from slipstream.quantize.names import DEFAULT_EXCLUDE
    from slipstream.quantize.report import rows_of

    settings: dict[str, Any] = {
        "qformat": qformat,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_skip_layers": _layers(kv_cache_dtype_skip_layers),
        "group_size": 128 if awq_block_size is None else awq_block_size,
        "exclude": (*DEFAULT_EXCLUDE, *(exclude_modules or ())),
        "desc_act": desc_act,
        "bits": auto_quantize_bits,
        "seed": random_seed,
    }
    if awq_block_size is not None and not Settings(**settings).method.chooses_groups:
        raise UsageError(
            f"--awq_block_size is of int4 formats and w4a8_awq; leave it out with --qformat {qformat}, or give "
            "int4_awq."
        )
    with progress_bar() as progress:
        report = quantize_model(
            model_dir, output_dir, calib_size=calib_size, calib_dataset=calib_dataset,
            calib_max_seq_length=calib_max_seq_length, dtype=dtype, export_format=export_format, device=device,
            progress=progress, **settings,
        )  # fmt: skip
    print_table(f"{output_dir}: {qformat}", (), rows_of(report))


def _layers(listed: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(layer) for layer in listed.split(",")})) if listed else ()
    except ValueError:
        raise UsageError(
            f"--kv_cache_dtype_skip_layers is {listed!r}; it must be layers with commas, such as 0,29."
        ) from None
