"""--config: a verb's options from a YAML file (JSON is YAML, too). What is typed wins over it."""

import difflib
from pathlib import Path
from typing import Any

from slipstream.errors import UsageError

_SECRET = ("api_key",)


def use_config_file(ctx: Any, path: Path | None) -> Path | None:
    """Callback of the eager option: from here on the file's values are the options' defaults."""
    if path is not None:
        ctx.default_map = _values(ctx.command.get_params(ctx), path)
    return path


def effective_values(ctx: Any) -> str:
    """What was typed or is in the file, as one line."""
    given = [name for name in ctx.params if ctx.get_parameter_source(name).name != "DEFAULT" and name != "config"]
    return " ".join(f"{name}={'***' if name in _SECRET else ctx.params[name]}" for name in sorted(given))


def _values(options: Any, path: Path) -> dict[str, Any]:
    by_flag = {flag.lstrip("-"): option for option in options for flag in option.opts if option.name != "config"}
    values = {}
    for key, value in _read(path).items():
        option = by_flag.get(str(key).replace("-", "_"))
        if option is None:
            near = difflib.get_close_matches(str(key), by_flag, n=1)
            advice = f"perhaps {near[0]} is meant" if near else "keys are the flags' names"
            raise UsageError(f"--config {path} has {key!r}, which is no option; {advice}.")
        if value is None or isinstance(value, dict) or (isinstance(value, list) and not _is_repeatable(option)):
            raise UsageError(f"--config {path} has {key}: {value!r}; give one value, as the flag takes it.")
        is_lone = _is_repeatable(option) and not isinstance(value, list)
        values[option.name] = [value] if is_lone else value
    return values


def _is_repeatable(option: Any) -> bool:
    return bool(getattr(option, "multiple", False))


def _read(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({error}); give a YAML file.") from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"--config {path} is no YAML ({' '.join(str(error).split())}); write one key: value a line."
        ) from None
    if not isinstance(read, dict):
        raise UsageError(f"--config {path} holds no options; write one key: value a line, such as port: 8000.")
    return read
