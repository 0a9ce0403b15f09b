"""Chat templates on a budget: published ones render as transformers renders them, and none takes memory or time without
end."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from avl_edge.config import Picture
from avl_edge.errors import BadModel
from avl_edge.model.prompt.chat import one_question
from avl_edge.model.prompt.sandbox import BUDGET, SOURCE_LENGTH, Sandbox
from avl_edge.model.prompt.template import JinjaTemplate
from tests.equipment.processes import PEAK_MEMORY, run_python
from tests.equipment.small_processors import LLAVA_TEMPLATE, STRING_TEMPLATE

# What templates of Qwen-VL, InternVL, LLaVA-1.6 and of models with tools are made of.
QWEN_LIKE = """{%- set images = namespace(value=0) %}{%- set videos = namespace(value=0) %}
{%- macro parts(content, count, system=false) %}
    {%- if content is string %}{{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content %}
            {%- if 'image' in item or 'image_url' in item or item.type == 'image' %}
                {%- if system %}{{- raise_exception('no pictures in system messages') }}{%- endif %}
                {%- if count %}{%- set images.value = images.value + 1 %}{%- endif %}
                {{- 'Picture ' ~ images.value ~ ': ' if add_vision_id }}{{- '<|vision_start|><image><|vision_end|>' }}
            {%- elif item.type == 'video' %}{%- set videos.value = videos.value + 1 %}{{- '<video>' }}
            {%- elif 'text' in item %}{{- item.text }}
            {%- else %}{{- raise_exception('unknown part ' + item.type) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + parts(messages[0].content, false, true) | trim }}
{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.' }}{%- endif %}
{%- if tools %}{{- '\\n# Tools' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}
    {%- for name, value in tool.function.parameters.properties | dictsort %}
        {{- '%s: %s' | format(name, value.type | default('any') | upper) }}{{- ', ' if not loop.last }}
    {%- endfor %}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- set ns = namespace(last=messages | length - 1, open=true, names=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.open and message.role == 'user' and not (message.content is string
            and message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = parts(message.content, true) %}
    {%- set ns.names = ns.names + [message.role] %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' ~ ('<think>' ~ thought ~ '</think>' if loop.index0 > ns.last) ~ content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{{- ns.names | unique | map('capitalize') | join(' & ') }} {{ ns.names | reject('equalto', 'user') | list }}
{{- (7 // 2, 7 % 4, 2 ** 10, 'ab' * 3, '%03d' % 7, [1, 2] + [3], {'k': 1}.get('k'), 1.5 | round, 'x y'.title()) }}"""
TREE = """{%- for node in [[1, [2, [3]]], [4]] recursive %}{{ node if node is number else loop(node) }}{% endfor %}
{%- set both %}{% for m in messages %}{{ loop.cycle('odd', 'even') }}{{ loop.changed(m.role) }}{% endfor %}{% endset %}
{{ both | indent(2) | replace('odd', 'o') }}{% macro wrapped() %}{{ caller('in') }}{% endmacro %}
{%- call(x) wrapped() %}[{{ x }}]{% endcall %}{{ strftime_now is defined }}{{ nothing is defined }}"""
TEMPLATES = [QWEN_LIKE, LLAVA_TEMPLATE, STRING_TEMPLATE, TREE]


def rendered(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    sandbox = Sandbox({"tojson": _tojson}, {"raise_exception": _raise, "strftime_now": str})
    given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
    return sandbox.render(sandbox.compiled(source), given, BUDGET)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise ValueError(message)


def _expected(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    (text,), _ = render_jinja_template([messages], tools=tools, chat_template=source, add_generation_prompt=True)
    return str(text)


texts = st.text(max_size=30) | st.sampled_from(["<think>\nhm\n</think>\n\nyes", "<tool_response>4</tool_response>", ""])
parts = st.lists(
    st.just({"type": "image"}) | st.just({"type": "video"}) | texts.map(lambda text: {"type": "text", "text": text}),
    max_size=4,
)
TOOL = {"name": "look", "parameters": {"properties": {"where": {"type": "string"}, "at": {}}}}
CALL = {"function": {"name": "look", "arguments": {"where": "là", "at": [1, 2]}}}


@settings(max_examples=60)
@given(
    source=st.sampled_from(TEMPLATES[:2]),
    system=st.none() | texts,
    turns=st.lists(st.tuples(parts, texts), min_size=1, max_size=3),
    tools=st.sampled_from([None, [{"type": "function", "function": TOOL}]]),
)
def test_templates_render_as_transformers_renders_them(source: str, system: Any, turns: Any, tools: Any) -> None:
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for content, answer in turns:
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}], "tool_calls": [CALL]})
    assert rendered(source, messages, tools) == _expected(source, messages, tools)


@pytest.mark.parametrize("source", TEMPLATES[2:])
def test_templates_of_strings_render_as_transformers_renders_them(source: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    assert rendered(source, messages, None) == _expected(source, messages, None)


DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
LONG = "('a' * 100000)"
BOMBS = {
    "repetition": "{% set x = 'a' * 500000000 %}",
    "repetition, turned": "{% set x = 500000000 * 'a' %}",
    "repetition of a list": "{% set x = [0] * 500000000 %}",
    "repetition of long text": "{% set x = " + LONG + " * 100000 %}",
    "power": "{% set x = 10 ** 100000000 %}",
    "power of powers": "{{ (2 ** 60) ** (2 ** 40) }}",
    "squares": DOUBLING.replace("START", "10 ** 500").replace("STEP", "ns.x * ns.x"),
    "width": "{{ '%1000000000d' % 1 }}",
    "width as an argument": "{{ '%*d' % (1000000000, 1) }}",
    "width of the filter": "{{ '%1000000000d' | format(1) }}",
    "width of the method": "{{ '{:1000000000}'.format(1) }}",
    "width of a marked text": "{{ ('%1000000000d' | safe) % 1 }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "center, mapped": "{{ ['a'] | map('center', 1000000000) | list }}",
    "method": "{{ 'a'.center(1000000000) }}",
    "method of a marked text": "{{ ('a' | safe).zfill(1000000000) }}",
    "method as an item": "{{ 'a'['ljust'](1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "indent": "{{ 'a' | indent(1000000000, true) }}",
    "indent by text": "{{ 'a\\nb' | indent(width=" + LONG + ") | replace('a', " + LONG + ") }}",
    "join": "{{ range(99999) | join(" + LONG + ") }}",
    "join as a method": "{{ " + LONG + ".join(('b' * 100000) | map('upper')) }}",
    "replace": "{{ " + LONG + " | replace('a', 'b' * 100000) }}",
    "replace, turned": "{{ " + LONG + " | replace(new='b' * 100000, old='a') }}",
    "replace as a method": "{{ " + LONG + ".replace('', 'b' * 100000) }}",
    "tojson": "{{ [[1]] | tojson(indent=1000000000) }}",
    "separators": "{{ range(9999) | list | tojson(separators=(" + LONG + ", 'b')) }}",
    "round": "{{ 1.5 | round(100000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "date": "{{ strftime_now('%Y' * 100000) }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "rounds left out": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "text in a loop": "{% for i in range(99999) %}" + "a" * 50_000 + "{% endfor %}",
    "text kept": "{% set x %}{% for i in range(99999) %}" + "a" * 50_000 + "{% endfor %}{% endset %}",
    "~": DOUBLING.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
    "+": DOUBLING.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
    "lists": DOUBLING.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "tuples as keys": DOUBLING.replace("START", "(1,)").replace("STEP", "(ns.x, ns.x)") + "{% set y = {ns.x: 1} %}",
    "dicts": DOUBLING.replace("START", "1").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "namespaces": DOUBLING.replace("START", "1").replace("STEP", "namespace(a=ns.x, b=ns.x)"),
    "kept slices": DOUBLING.replace("START", "[]").replace("STEP", "ns.x + [" + LONG + "[1:]]") * 50,
    "comparisons": "{% set x = range(9999) | list %}{% for i in range(9999) %}{% if -1 in x %}{% endif %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "filter block": "{% filter replace('a', 'b' * 100000) %}" + "a" * 50_000 + "{% endfilter %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sum": "{{ 1" + " + 1" * 10_000 + " }}",
    "long source": "a" * (SOURCE_LENGTH + 1),
}
BODY = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"


def test_no_template_takes_memory_or_time_without_end(tmp_path: Path) -> None:
    """Each, in a process that has a few hundred megabytes beside what Python itself takes."""
    (tmp_path / "bombs.json").write_text(json.dumps(BOMBS))
    program = f"""
        import json, resource, time
        from avl_edge.errors import BadModel
        from avl_edge.model.prompt.template import JinjaTemplate

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bombs = json.load(open({str(tmp_path / "bombs.json")!r}))
        for name, source in bombs.items():
            start = time.process_time()
            try:
                JinjaTemplate(source + {BODY!r}, {{}}, "<image>", "model")
            except BadModel as error:
                print(json.dumps([name, str(error), time.process_time() - start]))
        print(peak_memory())
    """
    *lines, peak = run_python(PEAK_MEMORY + dedent(program)).splitlines()
    found = {name: (message, seconds) for name, message, seconds in map(json.loads, lines)}
    assert found.keys() == BOMBS.keys()
    for message, seconds in found.values():
        assert message.startswith("the chat template in model")
        assert len(message) < 300
        assert seconds < 10
    assert int(peak) < 200_000  # kB


def test_the_budget_grows_with_the_prompt_and_is_each_threads_own() -> None:
    template = JinjaTemplate(LLAVA_TEMPLATE, {}, "<image>", "model")
    prompt = "word " * 400_000
    assert template.render(one_question([Picture(1, 1, 1)], prompt, "Be brief.")).count("word ") == 400_000
    sandbox = Sandbox({}, {})
    slow = sandbox.compiled("{% for i in range(2000) %}{{ i }}{% endfor %}")
    failures: list[Exception] = []

    def render() -> None:
        try:
            for _ in range(5):
                assert sandbox.render(slow, {}, 30_000).endswith("1999")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with pytest.raises(SecurityError, match="more steps or more memory"):
        sandbox.render(slow, {}, 3000)


def test_what_is_not_offered_is_named() -> None:
    for source, reason in {
        "{{ 'a' | center(5) }}": "No filter named 'center'",
        "{{ 'a'.center(5) }}": "the method center of a str is not supported",
        "{{ namespace }}": "it uses a type as a value",
        "{{ 'a' * 3000000 }}": "it takes more steps or more memory than any chat template needs",
    }.items():
        with pytest.raises(BadModel, match=reason):
            JinjaTemplate(source + BODY, {}, "<image>", "model")
