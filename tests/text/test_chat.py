"""Chat templates: equal to transformers, and harmless when hostile."""

import contextlib
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from slipstream.errors import ModelError, RequestError
from slipstream.text import sandbox
from slipstream.text.chat import render_chat

USER = [{"role": "user", "content": "Hi <b>&amp;</b> 你好"}]
CHATS: list[list[dict[str, Any]]] = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER],
    [*USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "  spaces\n"}],
]
TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}\n  {%- set ns.n = ns.n + 1 %}\n{{ ns.n }}/{{ loop.length }}"
    "{{ ', ' if not loop.last }}{{ loop.previtem.role if loop.previtem is defined }}{% endfor %}",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ tools is none }} {{ documents is none }}",
    "{% for m in messages if m.role == 'user' %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}none{% endfor %}",
    "{% macro line(m) %}{{ m.role ~ ': ' ~ m.content }}{% endmacro %}{{ line(messages[-1]) }}{{ unknown_name }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}{{ messages[1:] | map(attribute='role') | list }}",
    "{{ add_generation_prompt }}{{ dict(a=1) }}{{ range(3) | list }}{{ (1, 2) + (3,) }}{{ 'ab' * 2 }}{{ 2 ** 10 }}",
]


def render(template: str | None, messages: Any = USER, **options: Any) -> str:
    return render_chat(template, messages, **{"bos_token": "<s>", "eos_token": "</s>", **options})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(template: str, chat: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>"
    )
    assert render(template, chat, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.real_model
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_smollm2_equals_transformers(
    smollm2: Any, smollm2_gguf: Path, chat: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=smollm2._backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    options = {"add_generation_prompt": add_generation_prompt}
    expected = oracle.apply_chat_template(chat, tokenize=False, chat_template=smollm2.chat_template, **options)
    prompt = render(smollm2.chat_template, chat, bos_token=smollm2.bos_token, eos_token=smollm2.eos_token, **options)
    assert prompt == expected
    assert smollm2.encode(prompt, add_special_tokens=False)[0] == smollm2.bos_token_id


def test_tools_and_extra_names_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    template = "{{ tools[0].function.name }} {{ enable_thinking }} {{ strftime_now('%Y') | length }}"
    assert render(template, tools=tools, enable_thinking=False) == "now False 4"


def test_unset_special_tokens_render_as_nothing() -> None:
    assert render("[{{ bos_token }}]", bos_token=None) == "[]"


def test_contents_a_message_may_have() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = [{"role": "user", "content": parts}, call, {"role": "assistant", "tool_calls": []}]
    assert render("{{ messages[0].content[0].text }}{{ messages[1].content }}", messages) == "aNone"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\] must be a dict with a role"),
        ([*USER, {"role": 1, "content": "x"}], r"messages\[1\] must be a dict with a role"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] must be"),
        ([{"role": "user", "content": {"text": "x"}}], r"messages\[0\]\['content'\] must be"),
        ([{"role": "user", "content": [1]}], r"messages\[0\]\['content'\] must be"),
        ([{"role": "user", "content": "x", "when": object()}], "not JSON serializable"),
    ],
)
def test_messages_are_checked(messages: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        render("{{ messages | length }}", messages)


def test_a_model_without_a_template() -> None:
    with pytest.raises(ModelError, match="--chat_template"):
        render(None)


def test_a_template_may_refuse() -> None:
    with pytest.raises(RequestError, match="cannot render these messages: Roles must alternate"):
        render("{{ raise_exception('Roles must alternate!') }}")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (raise_exception | attr('__globals__'))['json'] }}",
    "{{ range.__self__ }}{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.call.__func__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__html__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = ''.format %}{{ ['{0.__class__}'] | map('format', 1) | first }}{{ f.__self__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages | map(attribute='__class__') | list | first }}{{ lipsum.__globals__['os'] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ cycler.__init__ }}{{ joiner.__init__.__globals__.os }}",
    "{{ (1).__class__.from_bytes.__self__ }}{{ messages[0].__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_are_refused(template: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with contextlib.suppress(RequestError):
        assert render(template, messages) == ""  # Jinja makes an unsafe attribute an undefined one
    assert messages == [{"role": "user", "content": "x"}]


RUNAWAYS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100001) %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for i in range(99) recursive %}{% if loop.depth < 9 %}{{ loop(range(99)) }}{% endif %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 12 }}",
    "{{ 9 ** 99999 }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1, 2]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set s = 'a' * 100000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
    "{% for i in range(100000) %}{% set x = range(100000) | sum %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = range(100000) | list | sort %}{% endfor %}",
    "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
    "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
]


@pytest.mark.parametrize("template", RUNAWAYS)
def test_runaways_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    begin = time.thread_time()  # of a core: others may have it meanwhile
    with pytest.raises(RequestError, match="cannot render"):
        render(template)
    assert time.thread_time() - begin < 20


HUGE = [
    "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 4) }}",
    "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 4) }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 4) }}",
    "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 4}) }}",
    "{{ ('b' * 10 ** 6).join(['a'] * 10 ** 4) }}",
    "{{ ('b' * 10 ** 6).join('a' * 10 ** 4) }}",
    "{{ (['b' * 10 ** 6] * 10 ** 4) | join }}",
    "{{ range(10000) | join('b' * 10 ** 6) }}",
    "{{ ([{'a': 'b' * 10 ** 6}] * 10 ** 4) | join(attribute='a') }}",
    *(f"{{{{ 'a'.{name}(10 ** 10) }}}}" for name in ("ljust", "rjust", "center", "zfill")),
    "{% set f = 'a'.ljust %}{{ f(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ ('\t' * 10 ** 5).expandtabs(10 ** 6) }}",
    "{{ ('a\n' * 10 ** 5) | indent(10 ** 6) }}",
    "{{ 'a' | indent(10 ** 10, first=True) }}",
    "{{ ('a\n' * 10 ** 5) | indent('b' * 10 ** 6) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "{{ '{:.{w[0]}f}'.format(1.5, w=[10 ** 10]) }}",
    "{{ ('{0}' * 10 ** 5).format('a' * 10 ** 6) }}",
    "{{ ('{a}' * 10 ** 5).format_map({'a': 'a' * 10 ** 6}) }}",
    "{{ (('{0}' * 10 ** 5) | safe).format('a' * 10 ** 6) }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
    "{{ ('%(a)s' * 10 ** 5) % {'a': 'a' * 10 ** 6} }}",
    "{{ '%.*f' | format(10 ** 9, 1.5) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ messages | tojson(indent='a' * 10 ** 7) }}",
    "{{ (range(10000) | list) | tojson(separators=('a' * 10 ** 6, ':')) }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ ('a' * 10 ** 6).encode().replace('a'.encode(), ('b' * 10 ** 4).encode()) }}",
]


@pytest.mark.parametrize("template", HUGE)
def test_one_huge_operation_is_refused_before_it_runs(template: str) -> None:
    render("")  # imports what it needs
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(RequestError, match=r"above|unsafe"):
            render(template)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * sandbox.MAX_CHARACTERS
    assert time.process_time() - begin < 20  # milliseconds without tracemalloc; hours if it ran


def test_what_is_bounded_does_what_it_did() -> None:
    for expression, expected in [
        ("'a-b-c'.replace('-', '+', 1) ~ ('a-b' | replace('-', '+')) ~ (12 | replace(1, 3))", "a+b-ca+b32"),
        ("'a'.ljust(3, '.') ~ 'a'.rjust(2) ~ 'a'.center(3) ~ '7'.zfill(3) ~ ('a' | center(3))", "a.. a a 007 a "),
        ("'\t'.expandtabs(2) ~ 'a'.translate({97: 'bc'})", "  bc"),
        ("', '.join(['a', 'b']) ~ ([1, 2] | join('-')) ~ (messages | join(attribute='role'))", "a, b1-2user"),
        ("'a\nb' | indent(2, first=True)", "  a\n  b"),
        ("'{0:>3}{a[0]}{0!r}'.format('x', a=[5]) ~ '{a:{w}}'.format_map({'a': 1, 'w': 2})", "  x5'x' 1"),
        ("('<{}>' | safe).format('<') ~ ''", "<&lt;>"),
        ("'**%s** %5.1f %%' % ('a', 5)", "**a**   5.0 %"),
        ("'%(a)s (20240101), 99999999' % {'a': 1} ~ ('%s-%s' | format(1, 'b')) ~ 7 % 4", "1 (20240101), 999999991-b3"),
        ("{'a': ['é', 1.5]} | tojson(indent=1, separators=(',', ':'))", '{\n "a":[\n  "é",\n  1.5\n ]\n}'),
    ]:
        assert render("{{ " + expression + " }}") == expected


def test_templates_that_do_not_parse() -> None:
    for template in (
        "{% for %}",
        "{{ messages ",
        "{% nonsense %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nope.nope }}",
    ):
        with pytest.raises(RequestError, match=r"^The chat template cannot render these messages: [^\n]+\.$"):
            render(template)
    with pytest.raises(RequestError, match="above 1048576"):
        render("x" * (1024 * 1024 + 1))


def test_long_conversations_stay_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 1000}] * 500
    assert len(render(TEMPLATES[0], messages)) > 2_000_000
