"""Conversations that are written once are written as the tokenizer writes them, beginning by beginning."""

import copy
import itertools
from dataclasses import replace

import pytest

from gemma2_jax.data.chat import open_chat_format, split_conversation
from gemma2_jax.data.encoding import gemma_chat_template
from gemma2_jax.data.message_bounds import bound_messages
from gemma2_jax.data.records import BadRecord, Example, Turn
from gemma2_jax.data.report import Report

CUE = "{% if add_generation_prompt %}<a>{% endif %}"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BOUNDED = {
    "gemma": gemma_chat_template(),
    "chatml": CHATML,
    "counts": "{{ bos_token }}{% for m in messages %}{% if not loop.first %}\n{% endif %}{{ loop.index }}. "
    "{{ m.content.strip() | upper }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}" + CUE,
    "first message": "{{ messages[0].role }}{% for m in messages %}{% set r = m.role if loop.index0 else 'start' %}"
    "[{{ r }}:{{ m.content }}]{% endfor %}" + CUE,
    "whitespace": "{{- bos_token }}\n  {%- for m in messages %}\n  {{ m.content }}  \n  {%- endfor %}\n\n" + CUE,
    "end": "{% for m in messages %}{{ m.content }};{% endfor %}{{ eos_token }}" + CUE,
}
LOOP = "{% for m in messages %}{{ m.content }};"
UNBOUNDED = {
    "last": "{% for m in messages %}{{ m.content }}{{ '' if loop.last else ';' }}{% endfor %}" + CUE,
    "length": LOOP + "{{ loop.length }}{% endfor %}" + CUE,
    "count of messages": "{{ messages | length }}" + LOOP + "{% endfor %}" + CUE,
    "last message": LOOP + "{% endfor %}{{ messages[-1].role }}" + CUE,
    "second message": "{{ messages[1].role }}" + LOOP + "{% endfor %}" + CUE,
    "first message at the end": LOOP + "{% endfor %}{{ messages[0].content }}" + CUE,
    "cue in the loop": LOOP + "{{ add_generation_prompt }}{% endfor %}",
    "cue before it": "{{ add_generation_prompt }}" + LOOP + "{% endfor %}",
    "another list": "{% set rest = messages[1:] %}{% for m in rest %}{{ m.content }}{% endfor %}" + CUE,
    "a name for all": "{% set all = messages %}" + LOOP + "{{ all[-1].content }}{% endfor %}" + CUE,
    "a name for the loop": LOOP + "{% set l = loop %}{{ l.last }}{% endfor %}" + CUE,
    "an item of the loop": LOOP + "{{ loop['last'] }}{% endfor %}" + CUE,
    "next message": LOOP + "{{ loop.nextitem }}{% endfor %}" + CUE,
    "two loops": LOOP + "{% endfor %}" + LOOP + "{% endfor %}" + CUE,
    "filtered": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}" + CUE,
    "state": "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}" + CUE,
    "assigned": "{% set x = messages[0].content %}" + LOOP + "{% endfor %}{{ x }}" + CUE,
    "date": "{{ strftime_now('%Y') if strftime_now is defined }}" + LOOP + "{% endfor %}" + CUE,
    "random": LOOP + "{{ [1, 2] | random }}{% endfor %}" + CUE,
    "json": LOOP + "{{ m | tojson }}{% endfor %}" + CUE,
    "break": LOOP + "{% break %}{% endfor %}" + CUE,
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}" + CUE,
    "macro": "{% macro f() %}x{% endmacro %}" + LOOP + "{{ f() }}{% endfor %}" + CUE,
    "no loop": "{{ messages[0].content }}" + CUE,
    "reassigned": "{% set messages = [messages[0]] %}" + LOOP + "{% endfor %}" + CUE,
    "not a template": "{% for %}",
}
CONTENTS = ("a\n\n b", "  c\n", "<end_of_turn>", "{{ d }}", "é\u2028", "the end of a message")


def talk(roles):
    letters = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    turns = [Turn(role=letters[role], content=CONTENTS[at % 6], is_learned=at != 3) for at, role in enumerate(roles)]
    return Example(where="a:1", turns=tuple(turns))


def with_template(tokenizer, template):
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def split(example, chat):
    try:
        return split_conversation(example, chat, Report())
    except BadRecord as error:
        return str(error)


@pytest.mark.parametrize("name", BOUNDED)
def test_one_run_of_a_template_gives_the_same_pieces(name, tokenizer):
    chat = open_chat_format(with_template(tokenizer, BOUNDED[name]), "refuse")
    assert chat.bounded is not None
    one_by_one = replace(chat, bounded=None)
    talks = ["".join(roles) for count in range(1, 5) for roles in itertools.product("uast", repeat=count)]
    for roles in [*(roles for roles in talks if "a" in roles), "uauauau"]:
        assert split(talk(roles), chat) == split(talk(roles), one_by_one), roles


@pytest.mark.parametrize("name", UNBOUNDED)
def test_templates_that_look_further_have_no_bounds(name, tokenizer):
    assert bound_messages(UNBOUNDED[name], tokenizer.special_tokens_map) is None


def test_an_answer_takes_no_run_of_its_own(tokenizer, monkeypatch):
    chat = open_chat_format(with_template(tokenizer, CHATML), "refuse")
    expected = split(talk("uaua"), chat)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", None)
    assert split(talk("uaua"), chat) == expected


def test_a_tokenizer_that_writes_otherwise_is_asked_each_time(tokenizer, monkeypatch):
    written = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *given, **options: "!" + written(*given, **options)
    )
    assert open_chat_format(with_template(tokenizer, CHATML), "refuse").bounded is None


def test_a_beginning_that_is_far_too_long_is_refused(tokenizer):
    long = "{% for m in messages %}{{ '%1200000d' % 0 if loop.first }}{{ m.content }}{% endfor %}"
    chat = open_chat_format(with_template(tokenizer, BOUNDED["chatml"]), "refuse")
    chat = replace(chat, tokenizer=with_template(tokenizer, long), bounded=bound_messages(long, {}))
    turns = (*talk("ua").turns, Turn(role="user", content="x" * 100_000), Turn(role="assistant", content="y"))
    example = Example(where="a:1", turns=turns)
    assert "writes 1,200,00" in split(example, chat)
    assert split(example, chat) == split(example, replace(chat, bounded=None))
