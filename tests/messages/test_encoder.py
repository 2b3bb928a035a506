from __future__ import annotations

import subprocess
import sys

import pytest

from mara_integrations.errors import ConfigError, ContextLengthError, ModelError
from mara_integrations.messages import Conversation, Message, PromptEncoder, Tool, ToolCall
from mara_integrations.testing import tiny_tokenizer

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
# as Gemma's: no system role, strict alternation, writes BOS itself
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
KNOWS_TOOLS = (
    "{% if tools %}tools={{ tools | map(attribute='function') | map(attribute='name') | join(',') }};{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.role == 'tool' %}:{{ m.name }}{% endif %}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}</>"
    "{% endfor %}"
)

WEATHER = Tool("weather", "Of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = [
    Message("user", "Rain in Oslo?"),
    Message("assistant", tool_calls=(ToolCall("c1", "weather", {"city": "Oslo"}),)),
    Message("tool", "yes", tool_call_id="c1"),
]


def encoder(template: str | None = CHATML, *, bos: bool = False, eos: bool = False, **settings) -> PromptEncoder:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    single = " ".join([f"{tokenizer.bos_token} " * bos + "$A", *[tokenizer.eos_token] * eos])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return PromptEncoder(tokenizer, name="tiny", **settings)


def test_a_conversation_ends_where_the_assistant_begins():
    assert encoder().render([Message("user", "hi")]) == "<user>hi</><assistant>"


def test_neighbours_of_one_role_become_one_turn():
    text = encoder().render(
        [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
    )
    assert text == "<user>a\n\nb</><assistant>c</><user>d</><assistant>"


@pytest.mark.parametrize("template", [STRICT, DROPS_SYSTEM])
def test_a_system_message_joins_the_user_turn_where_the_template_has_no_place_for_it(template):
    text = encoder(template).render([Message("system", "be brief"), Message("user", "hi")])
    assert text.endswith("<user>be brief\n\nhi</><assistant>")


def test_a_template_that_fails_on_every_form_is_one_clear_error():
    with pytest.raises(
        ModelError, match=r"chat template of 'tiny' fails on roles \['assistant', 'user'\]: Roles must"
    ) as e:
        encoder(STRICT).render([Message("assistant", "hi"), Message("user", "hi")])
    assert e.value.hint is not None and "\n" not in str(e.value)


def test_a_broken_template_is_the_same_error():
    with pytest.raises(ModelError, match="chat template of 'tiny' fails"):
        encoder("{{ nothing.at.all }}").render([Message("user", "hi")])


def test_template_variables_come_from_the_encoder_and_from_the_call():
    rendered = encoder("{{ mood }} {{ pace }}", template_kwargs={"mood": "calm", "pace": "slow"})
    assert rendered.render([Message("user", "hi")], pace="fast") == "calm fast"


def test_no_messages_are_refused():
    with pytest.raises(ConfigError, match="no messages"):
        encoder().render([])


def test_a_template_that_knows_tools_gets_them_as_they_are():
    text = encoder(KNOWS_TOOLS).render(CALL, [WEATHER])
    assert text == 'tools=weather;<user>Rain in Oslo?</><assistant>[weather {"city": "Oslo"}]</><tool:weather>yes</>'


def test_other_templates_get_tools_calls_and_results_as_text():
    text = encoder().render(CALL, [WEATHER])
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert '<assistant><tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call></>' in text
    assert '<user><tool_response>\n{"name": "weather", "content": "yes"}\n</tool_response></><assistant>' in text
    assert "<tool>" not in text


def test_a_conversation_brings_its_own_tools_and_takes_a_system_prompt_where_it_has_none():
    asked = (Message("user", "Hi"),)
    conversation = Conversation(asked, (WEATHER,))
    assert encoder().encode(conversation) == encoder().encode(asked, [WEATHER]) != encoder().encode(asked)
    assert conversation.with_system("Be brief.").messages == (Message("system", "Be brief."), *asked)
    assert conversation.with_system("One.").with_system("Two.").messages[0].content == "One."


def test_tools_and_a_system_message_share_one_turn():
    text = encoder(STRICT).render([Message("system", "be brief"), *CALL[:1]], [WEATHER])
    assert text.count("<user>") == 1 and text.index("be brief") < text.index("<tools>") < text.index("Rain")


def test_without_a_template_turns_are_named_and_their_names_stop_the_reply():
    plain = encoder(None)
    prompt = [Message("system", "Be brief."), Message("user", "hi")]
    assert plain.render(prompt) == "Be brief.\n\nUser: hi\nAssistant:"
    assert plain.stop_for(prompt) == ("\nUser:", "\nAssistant:")
    assert plain.stop_for("raw") == plain.stop_for([1, 2]) == encoder().stop_for(prompt) == ()


def test_raw_text_gets_one_bos_and_no_eos():
    enc = encoder(bos=True, eos=True)
    assert enc.encode("hi") == [5, *enc.tokenizer("hi", add_special_tokens=False)["input_ids"]]


def test_a_text_too_long_for_the_context_window_is_refused_before_it_is_tokenised():
    enc = encoder(max_tokens=10)
    longest = len("<eos>")
    assert len(enc.encode("x" * 10 * longest)) == 10 * longest  # its tokens are counted by who has the model
    enc.tokenizer = Untouched(enc.tokenizer)
    with pytest.raises(ContextLengthError, match="51 characters; this model's maximum context length is 10 tokens"):
        enc.encode("x" * (10 * longest + 1))
    with pytest.raises(ContextLengthError, match="maximum context length"):
        enc.encode([Message("user", "x" * 100)])


class Untouched:
    """A tokenizer that must not tokenise."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        raise AssertionError("it was tokenised")


def test_a_raw_text_is_tokenised_once():
    enc = encoder(bos=True, eos=True)
    enc.encode("a")
    calls = []
    plain = enc.tokenizer
    enc.tokenizer = lambda text, **settings: calls.append(text) or plain(text, **settings)
    enc.tokenizer.bos_token, enc.tokenizer.eos_token = plain.bos_token, plain.eos_token
    enc.encode("hello")
    assert calls == ["hello"]


def test_raw_text_that_begins_with_bos_gets_no_second_one():
    enc = encoder(bos=True)
    assert enc.encode(enc.tokenizer.bos_token + "hi") == enc.encode("hi")


def test_an_eos_that_the_user_wrote_stays():
    enc = encoder(eos=True)
    assert enc.encode("hi<eos>")[-1] == enc.tokenizer.eos_token_id


def test_a_template_that_writes_bos_gets_no_second_one():
    ids = encoder(STRICT, bos=True).encode([Message("user", "hi")])
    assert ids.count(5) == 1 and ids[0] == 5


def test_the_plain_form_gets_the_bos_of_a_raw_text():
    assert encoder(None, bos=True).encode([Message("user", "hi")])[0] == 5


def test_token_ids_pass_as_they_are():
    numpy = pytest.importorskip("numpy")
    assert encoder().encode([7, 0, 255]) == encoder().encode(numpy.array([7, 0, 255])) == [7, 0, 255]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "prompt is empty"),
        ([3, 256], "token id 256 is not in the vocabulary of 'tiny' \\(0 to 255\\)"),
        ([-1], "token id -1"),
        ([{"role": "user", "content": "hi"}], "a prompt can't be"),
        ([Message("user", "hi"), 3], "a prompt can't be"),
        (None, "a prompt can't be None"),
    ],
)
def test_other_prompts_are_refused_at_the_door(prompt, says):
    with pytest.raises(ConfigError, match=says):
        encoder().encode(prompt)


def test_the_module_starts_without_torch_and_transformers():
    code = "import sys, mara_integrations.messages; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
