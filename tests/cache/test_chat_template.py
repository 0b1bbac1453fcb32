from __future__ import annotations

import pytest

from pilotfish.cache.chat_template import render_chat
from pilotfish.protocol.errors import ModelError, UsageError

CHATML = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
HI = [{"role": "user", "content": "<b>hi</b> & bye"}]


def test_a_conversation_ends_where_the_answer_starts() -> None:
    assert render_chat(CHATML, HI) == "<|im_start|>user\n<b>hi</b> & bye<|im_end|>\n<|im_start|>assistant\n"


def test_what_templates_use() -> None:
    assert render_chat("{{ bos_token }}|{{ eos_token }}", HI, bos="<s>", eos="</s>") == "<s>|</s>"
    assert render_chat("{{ messages[0].content | tojson }}", HI) == '"<b>hi</b> & bye"'
    assert len(render_chat("{{ strftime_now('%Y') }}", HI)) == 4
    assert render_chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", HI) == "01"


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(UsageError, match="refuses these messages: no system role"):
        render_chat("{{ raise_exception('no system role') }}", HI)


def test_a_broken_template_is_a_broken_model() -> None:
    with pytest.raises(ModelError, match="not valid jinja2"):
        render_chat("{% for %}", HI)


@pytest.mark.parametrize("reach", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_leave_the_sandbox(reach: str) -> None:
    with pytest.raises(UsageError, match="refuses"):
        render_chat(reach, HI)
