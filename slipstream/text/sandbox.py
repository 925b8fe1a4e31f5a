"""Runs a Jinja chat template with bounded work. Imports jinja2 at once; `chat.py` imports this file when first used.

A template is code from whoever made the model folder. It runs in Jinja's immutable sandbox, with five harmless globals,
and is refused past a limit of: its own length, loop iterations and calls together, time, the size of what `+`, `*`, `~`
and `**` build, and the length of the result. Not covered: one single operation that is huge in itself, such as
`x.replace("", x)`, a format width like `"%9999999d"`, or a filter over the largest range; time is checked after it.
"""

import json
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARACTERS = 1024 * 1024
MAX_CHARACTERS = 16 * 1024 * 1024  # of the prompt, and of any value built on the way
MAX_WORK = 1_000_000  # loop iterations and calls; a long conversation takes some ten thousand
MAX_SECONDS = 10.0
MAX_POWER_BITS = 4096


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

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.filters.update(tojson=_tojson, counted=self._counted, sized=_sized)
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, of at most 100 000 numbers
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        self._work = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._spend()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        return _sized(super().call_binop(context, operator, left, right))

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend()
            yield value

    def _spend(self) -> None:
        self._work += 1
        if self._work > MAX_WORK:
            raise TemplateLimitError(f"it took more than {MAX_WORK} steps")
        if self._work % 64 == 0 and time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it ran longer than {MAX_SECONDS:g} s")


def _check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int) and len(value) * count > MAX_CHARACTERS:
            raise TemplateLimitError(f"it repeats a value {count} times, past {MAX_CHARACTERS} characters")


def _check_power(left: Any, right: Any) -> None:
    both_integers = isinstance(left, int) and isinstance(right, int)
    if both_integers and left.bit_length() * right > MAX_POWER_BITS:
        raise TemplateLimitError(f"it raises {left} to the power {right}, past {MAX_POWER_BITS} bits")


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_CHARACTERS:
        raise TemplateLimitError(f"it built a value of {len(value)} items, above {MAX_CHARACTERS}")
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
