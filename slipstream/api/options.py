"""What LLM(...) is given, checked before anything is built or loaded for it."""

import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from slipstream.errors import CapacityError, RequestError, UsageError

Choice = TypeVar("Choice", bound=StrEnum)


def check_options(values: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option of a type that it cannot have, naming what it must be."""
    for name, value in values.items():
        is_right, kind = _KINDS[name]
        if not is_right(value):
            raise UsageError(f"{name} is {value!r}; it must be {kind}.")


def check_limits(limits: Mapping[str, int | None]) -> None:
    """What no engine could be built for, before one is; each engine knows how high they may be."""
    for name, limit in limits.items():
        if limit is not None and (type(limit) is not int or limit < 1):
            raise CapacityError(f"{name} is {limit!r}; it must be a whole number of at least 1.")


def choice(kind: type[Choice], name: str, value: str) -> Choice:
    """The member of that value. Raises RequestError with those there are."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(kind)}.") from None


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return value is None or (isinstance(value, str | os.PathLike) and str(value) != "")


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_list_of_names(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence) and all(isinstance(each, str) for each in value)


def _is_window(value: Any) -> bool:
    windows = value if isinstance(value, Sequence) else (value,)
    return value is None or (len(windows) > 0 and all(type(each) is int and each >= 1 for each in windows))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer": (_is_path, "the path of a folder"),
    "dtype": (_is_name, "a string, such as 'auto'"),
    "kv_cache_dtype": (_is_name, "a string, such as 'auto'"),
    "device": (_is_name, "a string, such as 'auto'"),
    **dict.fromkeys(
        ("tp_size", "pp_size", "moe_ep_size"),
        (lambda value: value is None or (type(value) is int and value >= 1), "a whole number of at least 1"),
    ),
    "enable_block_reuse": (_is_switch, "True or False"),
    "enable_chunked_prefill": (_is_switch, "True or False"),
    "deterministic": (_is_switch, "True or False"),
    "max_attention_window_size": (_is_window, "a whole number of at least 1, or a list of them, such as 1024"),
    "sink_token_length": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0, such as 4"),
    "chat_template": (_is_text, "the text of a template, not its file: Path(…).read_text()"),
    "quantization": (_is_text, "a format, such as int8_wo"),
    "model_cls_file": (_is_path, "the path of a Python file"),
    "model_cls_name": (_is_name, "the name of a class"),
    "disabled_passes": (_is_list_of_names, "a list of names, such as ['fuse_qkv']"),
    "extra_passes": (_is_list_of_names, "a list of names, such as ['my_module:PASS']"),
    "plugins": (_is_list_of_names, "a list of names, such as ['my_module']"),
    "show_progress": (_is_switch, "True or False"),
}
