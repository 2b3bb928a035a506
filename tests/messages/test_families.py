from __future__ import annotations

import logging
from typing import Any

import pytest

from mara_integrations.messages import Message, PromptEncoder, Tool, ToolCall
from mara_integrations.messages.families import family_of
from mara_integrations.testing import tiny_tokenizer

# What the chat template of each family writes of a call, as its authors wrote it.
SNIPPETS = {
    "qwen_3": r"""{{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}""",
    "qwen_3_coder": r"""{{- '\n<tool_call>\n<function=' + tool_call.name + '>\n' }}""",
    "mimo": r"""{{- '<tool_call><function=' + tool_call.name + '>' }}""",
    "glm_4_7": r"""{{- '<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>""",
    "minimax": r"""{%- set toolcall_begin_token = '<minimax:tool_call>' -%}""",
    "deepseek_r1": r"""{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '\n```json\n'}}""",
    "deepseek_v3_1": r"""{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] }}""",
    "deepseek_v3_2": r"""{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }}function_calls>""",
    "deepseek_v4": r"""{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }}tool_calls>""",
    "deepseek_v4_1": r"""{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }} calls>""",
    "kimi": r"""<|tool_calls_section_begin|>{%- for tool_call in message['tool_calls'] -%}""",
    "exaone": r"""{{- '[|assistant|]' }}{{- '<tool_call>{"name": ' ~ tool_call.name }}""",
    "mistral": r"""{{- '[TOOL_CALLS] [' }}""",
    "mistral_v11": r"""{{- '[TOOL_CALLS]' + tool_call.function.name + '[ARGS]' }}""",
    "llama": r"""{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}<|start_header_id|>ipython""",
    "harmony": r"""{{- "<|start|>assistant to=functions." }}{{- "<|channel|>commentary json<|message|>" }}""",
}
ADD = Tool("add", "Of two numbers", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = [
    Message("user", "1?"),
    Message("assistant", tool_calls=(ToolCall("c1", "add", {"a": 1}),)),
    Message("tool", "one", tool_call_id="c1"),
]
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def encoder(template: str, added: tuple[str, ...] = (), name: str = "tiny") -> PromptEncoder:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(added), special_tokens=True)
    return PromptEncoder(tokenizer, name=name)


@pytest.mark.parametrize("family", SNIPPETS)
def test_a_family_is_known_by_what_its_template_writes(family: str) -> None:
    assert family_of("{% if tools %}{{ tools }}{% endif %}" + SNIPPETS[family]) == family


MINIMAX_M3 = "{%- set ns = ']<]minimax[>[' -%}{{ tools }}{{ ns + '<tool_call>\\n' + ns + '<invoke name=\"' }}"


@pytest.mark.parametrize("template", [None, "", "{{ messages }}", "{{ tools }}{{ '<|tool_call|>' }}", MINIMAX_M3])
def test_other_templates_are_of_no_known_family(template: str | None) -> None:
    assert family_of(template) is None


def test_a_template_that_takes_tools_and_writes_no_calls_is_known_by_its_tokens() -> None:
    marks = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")

    assert family_of("{{ tools }}", marks) == "kimi"
    assert family_of("{{ messages }}", marks) is None  # its author taught it no tools
    assert encoder("{{ tools }}", marks).family == "kimi"


def test_a_family_whose_template_takes_no_tools_gets_the_generic_form() -> None:
    assert family_of("{{ messages }}" + SNIPPETS["mistral"]) is None
    assert encoder("{{ messages }}" + SNIPPETS["mistral"]).family == "qwen_3"


DEEPSEEK = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for tool in m.tool_calls or [] %}"
    "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>'"
    " + tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}{% endfor %}"
)


def test_deepseek_is_told_of_tools_in_its_own_form_and_takes_arguments_as_text() -> None:
    text = encoder(DEEPSEEK).render(CALL, [ADD])

    assert text.startswith("<system>You may call these functions:\n<tools>\n")
    assert "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><function name><｜tool▁sep｜>" in text
    assert '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>' in text
    assert text.endswith("<tool>one") and "<tool_call>" not in text


def test_a_template_that_would_write_arguments_as_python_does_gets_them_as_text() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
    written = "{{ tools }}{% for m in messages %}" + calls + "{% endfor %}"

    assert encoder(written).render(CALL[:2]).endswith('{"a": 1}')


def test_kimi_gets_ids_that_are_headers_and_results_that_answer_them() -> None:
    template = (
        "{{ tools }}{# <|tool_calls_section_begin|> #}{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}[{{ c.id }}]{% endfor %}"
        "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
    )
    again = Message("assistant", tool_calls=(ToolCall("functions.add:7", "add", {"a": 2}),))
    result = Message("tool", "two", tool_call_id="functions.add:7")

    text = encoder(template).render([*CALL, again, result])

    assert text.endswith("[functions.add:0](functions.add:0)[functions.add:7](functions.add:7)")


def test_a_template_without_room_for_tools_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    blind = encoder(TURNS, name="org/blind")

    with caplog.at_level(logging.WARNING):
        blind.render([Message("user", "hi")])
        assert not caplog.records
        blind.render([Message("user", "hi")], [ADD])
        blind.encode([Message("user", "hi")], [ADD])

    (record,) = caplog.records
    assert "org/blind has no place for tools: they are described in the system message" in record.getMessage()


def test_a_form_of_calls_that_is_not_known_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    odd = encoder("{{ tools }}{{ '<|tool_call|>' }}" + TURNS, name="org/odd")

    with caplog.at_level(logging.WARNING):
        odd.render([Message("user", "hi")], [ADD])
        odd.render([Message("user", "hi")], [ADD])

    (record,) = caplog.records
    assert "org/odd writes tool calls in a form that is not known" in record.getMessage()
    assert odd.family == "qwen_3"


def test_a_known_form_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder("{{ tools }}" + SNIPPETS["mistral"] + TURNS).render([Message("user", "hi")], [ADD])

    assert not caplog.records
