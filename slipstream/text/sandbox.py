"""Runs a Jinja chat template with bounded work. Imports jinja2 at once; `chat.py` imports this file when first used.

A template is code from whoever made the model folder. It runs in Jinja's immutable sandbox, with five harmless globals,
and is refused past a limit of: its own length, loop iterations and calls together, time, the length of the result, and
the size of what is built on the way. What could make much of little (operators, `replace`, `join`, paddings, formats,
`tojson`) is bounded before it runs. Not covered: the text of a list that holds another many times over, at several
depths; huge arguments of strftime_now and of the filters batch, slice, sum and round; Jinja's slower filters, such as
wordwrap and urlize, over a text near the limit; `//` and `%` of giant numbers. Time is checked after each of those.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, update_wrapper, wraps
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_TEMPLATE_CHARACTERS = 1024 * 1024
MAX_CHARACTERS = 16 * 1024 * 1024  # of the prompt, and of any value built on the way
MAX_WORK = 1_000_000  # loop iterations and calls; a long conversation takes some ten thousand
MAX_SECONDS = 10.0
MAX_NUMBER_BITS = 4096  # of a product or power
MAX_INDENT = 16  # of tojson


class TemplateLimitError(TemplateError):
    """A limit at the top of this file was reached."""


def render(template: str, context: dict[str, Any]) -> str:
    """Returns the rendered text. context: plain JSON values, which the template cannot change.

    Raises TemplateError, and whatever else an expression of the template raises.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateLimitError(f"it has {len(template)} characters, above {MAX_TEMPLATE_CHARACTERS}")
    sandbox = _Sandbox()
    program = Template.from_code(sandbox, _compiled(template), sandbox.make_globals(None))
    pieces, size = [], 0
    for piece in program.generate(context):
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise TemplateLimitError(f"the prompt grew past {MAX_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=16)
def _compiled(template: str) -> CodeType:
    sandbox = _Sandbox()
    return sandbox.compile(_Meter().visit(sandbox.parse(template)))


class _Meter(NodeTransformer):
    """Sends what each loop runs over, and the result of each `~`, through a filter of the sandbox that counts it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(node, "sized", [], [], None, None, lineno=node.lineno)


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; the body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """Jinja's namespace() without names to which Python gives a meaning, like __html__."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Lives for one rendering and counts its work."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.filters.update({name: _bounded(FILTERS[name], bound) for name, bound in _FILTER_BOUNDS.items()})
        self.filters.update(join=_join, tojson=_tojson, counted=self._counted, sized=_sized)
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, of at most 100 000 numbers
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        self._work = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No bytes: no prompt needs them, and whatever is bounded for str would have to be for them."""
        return attr not in ("encode", "to_bytes") and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", None)
        if isinstance(text, str) and name == "join":
            args = (self.pieces(text, *args),)
        elif isinstance(text, str) and name in _METHOD_BOUNDS:
            _check_size(_METHOD_BOUNDS[name](text, *args, **kwargs))
        return _sized(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            is_markup = isinstance(text, Markup)
            formatter = _EscapeFormatter(self, escape=text.escape) if is_markup else _Formatter(self)
            return type(text)(formatter.vformat(text, args, kwargs))

        return update_wrapper(formatted, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_size(_percent_bound(left, right))
        return _sized(super().call_binop(context, operator, left, right))

    def pieces(self, separator: str, values: Iterable[Any]) -> list[Any]:
        """The strings to join, gathered as long as what they make stays within the limit."""
        pieces, size = [], 0
        for piece in self._counted(values):
            size += len(piece) + len(separator)
            _check_size(size)
            pieces.append(piece)
        return pieces

    def spend(self) -> None:
        self._work += 1
        if self._work > MAX_WORK:
            raise TemplateLimitError(f"it took more than {MAX_WORK} steps")
        if self._work % 64 == 0 and time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it ran longer than {MAX_SECONDS:g} s")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield value


class _Formatter(SandboxedFormatter):
    """str.format, one field after the other, as long as what they make stays within the limit."""

    def __init__(self, sandbox: _Sandbox, **options: Any) -> None:
        super().__init__(sandbox, **options)
        self._sandbox, self._size = sandbox, 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._sandbox.spend()
        _check_size(self._size + sum(map(int, re.findall(r"\d+", format_spec))))
        text = super().format_field(value, format_spec)
        self._size += len(text)
        _check_size(self._size)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


# --- how long a result could be, from the arguments ---


def _replace_bound(text: str, old: str, new: str, count: int | None = None) -> int:
    found = text.count(old)
    if count is not None and count >= 0:
        found = min(found, count)
    return len(text) + found * len(new)


def _pad_bound(text: str, width: int = 80, fill: str = " ") -> int:
    return max(len(text), width)


def _tabs_bound(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * tabsize


def _translate_bound(text: str, table: Any) -> int:
    values = table.values() if isinstance(table, Mapping) else table
    return len(text) * max((len(value) for value in values if isinstance(value, str)), default=1)


def _indent_bound(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    return len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else width)


_PERCENT_WIDTHS = re.compile(r"[%)][#0 +-]*(\d+|\*)?(?:\.(\d+|\*))?")  # no key can hide one: a `)` begins one too


def _percent_bound(text: str, values: Any) -> int:
    """Of `text % values`: each of its fields as wide as the widest value, and what it says of widths."""
    values = values if isinstance(values, tuple) else (values,)
    widths = [width for match in _PERCENT_WIDTHS.finditer(text) for width in match.groups() if width]
    if "*" in widths:  # a value is the width
        widths += [abs(value) for value in values if isinstance(value, int)] * widths.count("*")
    widest = max((len(str(value)) for value in values), default=0)
    return len(text) + text.count("%") * widest + sum(int(width) for width in widths if width != "*")


_METHOD_BOUNDS: dict[str, Callable[..., int]] = {
    "replace": _replace_bound,
    "ljust": _pad_bound,
    "rjust": _pad_bound,
    "center": _pad_bound,
    "zfill": _pad_bound,
    "expandtabs": _tabs_bound,
    "translate": _translate_bound,
}
_FILTER_BOUNDS: dict[str, Callable[..., int]] = {
    "replace": lambda text, old, new, count=None: _replace_bound(text, str(old), str(new), count),
    "center": _pad_bound,
    "indent": _indent_bound,
    "format": lambda text, *args, **kwargs: _percent_bound(text, kwargs or args),
}


def _bounded(function: Callable[..., Any], bound: Callable[..., int]) -> Callable[..., Any]:
    """A filter that first refuses what would grow past the limit."""
    takes_context = hasattr(function, "jinja_pass_arg")

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        text, *rest = args[1:] if takes_context else args
        _check_size(bound(str(text), *rest, **kwargs))
        return function(*args, **kwargs)

    return filtered


@pass_environment
def _join(sandbox: _Sandbox, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(sandbox, attribute), values)
    return str(d).join(sandbox.pieces(str(d), map(str, values)))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int):
            _check_size(len(value) * count)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_bits(bits: int) -> None:
    if bits > MAX_NUMBER_BITS:
        raise TemplateLimitError(f"it computes a number of {bits} bits, above {MAX_NUMBER_BITS}")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"it builds a value of {size} characters or items, above {MAX_CHARACTERS}")


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_size(len(value))
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@pass_environment
def _tojson(
    sandbox: _Sandbox,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter would escape <, > and & for HTML."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_INDENT:
        raise TemplateLimitError(f"tojson's indent is above {MAX_INDENT}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(sandbox.pieces("", encoder.iterencode(value)))
