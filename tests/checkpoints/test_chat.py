"""Chat templates: equal to transformers', and bounded whatever they do."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models

from strobe.checkpoints.chat import TEMPLATE_LIMIT, ChatTemplate
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.errors import RequestError, TokenizerError

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system\\n\\n" + system_message + "<|eot|>" }}
{%- if tools is not none and tools %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{%- endif %}
"""
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
  {%- if message.role == "user" and ns.last < 0 %}
    {%- set ns.last = messages|length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- macro show(text) -%}<<{{ text.strip('\\n').split('</think>')[-1].lstrip() }}>>{%- endmacro %}
{%- for message in messages %}
  {%- if loop.index0 > ns.last and message.role == "assistant" %}{%- continue %}{%- endif %}
  {% if message.content is string %}{{ message.role ~ ": " ~ show(message.content) }}
  {% else %}{{ message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('+') }}
  {% endif %}
{%- endfor %}
{{ strftime_now('%Y') }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
"""
TALK = [
    {"role": "system", "content": " Speak <b>plainly</b> & 'well'.  "},
    {"role": "user", "content": "hé\nllo"},
    {"role": "assistant", "content": "<think>hm</think>\n\nhi"},
    {"role": "user", "content": "again"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "wéather > rain"}}]


def backend() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1}, merges=[]))
    found.decoder = decoders.ByteLevel()
    return found


TRAINED = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
  {{ message.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ message.content }}
{% endif %}
{% endfor %}
"""


@pytest.mark.parametrize("template", [LLAMA, THINKING, TRAINED])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[:2]])
def test_equals_transformers(template, prompt, tools, talk):
    special = {"bos_token": "<s>"}
    ours = Tokenizer(backend(), special=special, chat_template=ChatTemplate(template))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>")
    given = ours.apply_chat_template(talk, add_generation_prompt=prompt, tools=tools, enable_thinking=False)
    assert given == theirs.apply_chat_template(
        talk,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=prompt,
        tools=tools,
        enable_thinking=False,
    )


def test_parts_of_content():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    text = ChatTemplate(THINKING).render([{"role": "user", "content": parts}], {})
    assert "a+b" in text
    assert str(datetime.date.today().year) in text


def test_the_template_s_own_refusal_is_passed_on():
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate(LLAMA).render([TALK[1], TALK[3]], {"bos_token": "", "tools": None})


def test_no_template():
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(backend()).apply_chat_template(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ lipsum(n=100000) }}",
        "{{ messages | pprint }}",
    ],
)
def test_stays_in_its_sandbox(template):
    with pytest.raises((RequestError, TokenizerError)):
        ChatTemplate(template).render([{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * ['x'] }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x'.ljust(width=10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
        "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
        "{{ ('y' * 99999).join(['x'] * 99999) }}",
        "{{ (['x'] * 99999) | join('y' * 99999) }}",
        "{{ ('\n' * 99999) | indent('y' * 99999) }}",
        "{{ ('\t' * 99999).expandtabs(99999) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['x']) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(64) %}"
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
        "{{ ('%(a)999s' * 99999) % {'a': 1} }}",
        "{{ ('{0}' * 99999).format('x' * 99999) }}",
        "{{ ('{a}' * 99999).format_map({'a': 'x' * 99999}) }}",
        "{{ ('<' * 4000000) | e }}",
        "{% set ns = namespace(x=range(99999)|list) %}"
        "{% for i in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
        "{{ strftime_now('%c' * 999999) }}",
        "{{ (1).from_bytes(('x' * 4000000).encode(), 'big') // 7 ** 64 }}",
    ],
)
def test_is_bounded(template):
    with pytest.raises(RequestError, match="refuses"):
        ChatTemplate(template).render([{"role": "user", "content": "x"}], {})


DOUBLED = "{%% set ns = namespace(x='x') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"


@pytest.mark.parametrize(
    "twice",
    [
        "[ns.x, ns.x]",
        "(ns.x, ns.x)",
        "{'a': ns.x, 'b': ns.x}",
        "{'a': ns.x, 'b': ns.x}.items()",
        "[ns.x] * 2",
        "[ns.x] + [ns.x]",
        "dict(a=ns.x, b=ns.x)",
        "{}.fromkeys([1, 2], ns.x)",
        "[nothing, nothing] | map('default', ns.x) | list",
    ],
)
def test_a_list_that_holds_another_twice_again_and_again(twice):
    """Of 2**60 letters written out, compared or hashed; in memory a list of two, sixty times."""
    with pytest.raises(RequestError, match="a list of more than"):
        ChatTemplate(DOUBLED % twice).render([], {})


def test_a_macro_s_arguments_and_a_namespace_in_itself():
    macro = "{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    with pytest.raises(RequestError, match="a list of more than"):
        ChatTemplate(macro + DOUBLED % "f(ns.x, ns.x) or ns.x").render([], {})
    assert (
        ChatTemplate("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}").render([], {}) == "<namespace>"
    )
    with pytest.raises(RequestError, match="a number too large"):
        ChatTemplate(DOUBLED.replace("'x'", "9999") % "ns.x * ns.x").render([], {})


def test_arithmetic_and_formats_are_as_ever():
    template = "{{ 7 // 2 }} {{ 7 % 4 }} {{ 7 / 2 }} {{ 3 - 5 }} {{ 2 ** 10 }} {{ '%s: %5.2f' % ('a', 2) }}"
    template += " {{ '{:>3}|{x}'.format('b', x=[1]) }} {{ {'a': [1, 'é']} | tojson(indent=1) }}"
    given = ChatTemplate(template).render([], {})
    assert given == '3 3 3.5 -2 1024 a:  2.00   b|[1] {\n "a": [\n  1,\n  "é"\n ]\n}'


def test_a_long_conversation_is_collected_message_by_message():
    messages = [{"role": "user", "content": f"message {i}"} for i in range(2000)]
    collect = (
        "{% set ns = namespace(kept=[]) %}"
        "{% for m in messages %}{% set ns.kept = ns.kept + [m] %}{% endfor %}"
        "{% for m in ns.kept %}{{ m.content }};{% endfor %}"
    )
    assert ChatTemplate(collect).render(messages, {}) == "".join(f"{m['content']};" for m in messages)


def test_input_is_bounded():
    with pytest.raises(RequestError, match="characters"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": "x" * (5 << 20)}], {})
    with pytest.raises(TokenizerError, match="longer than"):
        ChatTemplate("x" * (TEMPLATE_LIMIT + 1))


def test_a_run_after_a_refused_one_starts_afresh():
    heavy = ChatTemplate("{% for i in range(20) %}{% set x = 'x' * 4000000 %}{% endfor %}")
    for _ in range(2):
        with pytest.raises(RequestError, match="characters made"):
            heavy.render([], {})
    assert ChatTemplate("{{ 'x' * 3000000 }}").render([], {}) == "x" * 3000000


@pytest.mark.parametrize("source", ["{% if %}", "{{ x | no_such_filter }}", "{" * 5000 + "%", "{% for %}"])
def test_broken_templates_name_their_file(source):
    with pytest.raises((TokenizerError, RequestError), match=r"somewhere\.jinja"):
        ChatTemplate(source, Path("somewhere.jinja")).render([], {"x": 1})


def test_of_named_templates_tools_have_their_own():
    settings = {
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    }
    found = ChatTemplate.find(settings, Path("tokenizer_config.json"), None)
    assert found is not None
    assert [found.render([], given) for given in ({}, {"tools": None}, {"tools": TOOLS})] == ["d", "d", "t"]
    del settings["chat_template"][0]
    assert ChatTemplate.find(settings, Path("x"), None).render([], {"tools": TOOLS}) == "d"
    with pytest.raises(TokenizerError, match="tokenizer_config"):
        ChatTemplate.find({"chat_template": 5}, Path("tokenizer_config.json"), None)
