"""Which model or engine the flags mean."""

from pathlib import Path

from slipstream.errors import EngineError, UsageError


def choose_model(model: str | None, engine_dir: Path | None) -> str | Path:
    """What to open: --model in any form, or an --engine_dir that is one. Raises UsageError unless one was given."""
    if (model is None) == (engine_dir is None):
        given = "neither was" if model is None else "both were"
        raise UsageError(
            f"Give either --model (a folder, .gguf file, Hub id or smollm2) or --engine_dir; {given} given."
        )
    return model if engine_dir is None else engine_folder(engine_dir)  # type: ignore[return-value]


def engine_folder(path: Path) -> Path:
    """The folder itself, if it is an engine's. Nothing is downloaded and no alias is looked up."""
    from slipstream.checkpoint.source import resolve

    if not path.is_dir():
        raise EngineError(f"{path} is not a folder; give an engine folder, which slipstream build makes.")
    if not (path / "config.json").is_file():
        raise EngineError(f"{path} is not an engine folder (it has no config.json); make one with slipstream build.")
    if resolve(path).kind != "engine":
        raise EngineError(
            f"{path} is a model, not an engine; give it as --model, or make an engine of it with slipstream build."
        )
    return path
