"""`MARAEngine`: prompts, settings, batches, streams, and the end of its life."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
import weakref

import pytest

from mara_integrations import MARAEngine
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.workers import worker_for
from mara_integrations.errors import ConfigError, EngineClosedError, HeadError
from mara_integrations.messages import Conversation, Message
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

LONG = 400  # tokens


@pytest.fixture
def engine():
    return MARAEngine((tiny_model(), tiny_tokenizer()), max_new_tokens=6)


def is_idle(engine):
    """Whether nothing is decoded any more, a moment from now at most."""
    decoder = worker_for(engine.model).decoder
    deadline = time.monotonic() + 5.0
    while not decoder.is_idle and time.monotonic() < deadline:
        time.sleep(0.01)
    return decoder.is_idle


# --- prompts


def test_a_string_is_a_users_message_and_raw_text_is_said_to_be_raw(engine):
    message = engine.encode([Message("user", "hi")])

    assert engine.encode("hi") == engine.encode(Conversation((Message("user", "hi"),))) == message
    assert len(message) > len(engine.encode("hi", raw=True)) == 2
    assert engine.generate("hi", raw=True).token_ids == engine.generate(engine.encode("hi", raw=True)).token_ids


def test_messages_are_never_raw(engine):
    with pytest.raises(ConfigError, match="raw=True takes a string or token ids"):
        engine.generate([Message("user", "hi")], raw=True)


@pytest.mark.parametrize(
    "prompt", ["", [], [Message("user", "")], [Message("system", "Be brief."), Message("user", "")], Conversation(())]
)
def test_an_empty_prompt_is_refused_in_every_form(engine, prompt):
    for settings in ({}, {"system_prompt": "Be brief."}):
        with pytest.raises(ConfigError, match="the prompt is empty"):
            engine.generate(prompt, **settings)


@pytest.mark.parametrize("prompt", [[Message("system", "Be brief.")], Conversation((Message("system", "Be brief."),))])
def test_a_system_message_alone_is_no_prompt(engine, prompt):
    with pytest.raises(ConfigError, match=r"no message but the system's .hint: add one of the user"):
        engine.generate(prompt)


@pytest.mark.parametrize("prompt", ["a \udcff", [Message("system", "\ud800"), Message("user", "hi")]])
def test_text_that_is_not_unicode_is_refused(engine, prompt):
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        engine.generate(prompt)


def test_an_empty_turn_in_a_conversation_is_taken(engine):
    turns = [Message("system", ""), Message("user", "hi"), Message("assistant", ""), Message("user", "")]

    assert engine.generate(turns).token_ids


def test_a_system_prompt_stands_before_messages_and_not_before_raw_text(engine):
    system = [Message("system", "Be brief."), Message("user", "hi")]

    assert engine.encode("hi", system_prompt="Be brief.") == engine.encode(system)
    assert engine.encode(system, system_prompt="Be kind.") == engine.encode(system)
    assert engine.encode("hi", raw=True, system_prompt="Be brief.") == engine.encode("hi", raw=True)


def test_a_head_brings_the_system_prompt_it_was_trained_with(engine, tmp_path):
    path = random_head(32, "residual", system_prompt="Be brief.").save_pretrained(tmp_path / "head")
    brief = engine.encode([Message("system", "Be brief."), Message("user", "hi")])

    assert engine.encode("hi", head=path) == brief
    assert engine.encode("hi", head=path, system_prompt="") == engine.encode("hi")
    assert engine.encode("hi", head=path, strength=0) == engine.encode("hi")
    assert MARAEngine(engine.model, path).encode("hi") == brief


# --- settings


def test_another_view_of_an_engine_decodes_on_the_same_model(engine):
    head = random_head(32, "residual")
    view = engine.with_settings(head=head, max_new_tokens=3)

    assert view.model is engine.model and view.head is head and engine.head is None
    assert len(view.generate("hi").token_ids) == 3 < len(engine.generate("hi").token_ids)
    with pytest.raises(ConfigError, match="did you mean head"):
        engine.with_settings(hed=head)


def test_verify_decodes_what_generate_does(engine):
    view = engine.with_settings(head=random_head(32, "residual"), strength=0.5, temperature=0.8, seed=3)

    verification = view.verify("hi")

    assert verification.holds
    assert verification.token_ids == view.generate("hi").token_ids


def test_a_made_request_is_generated_as_it_is(engine):
    request = engine.request("hi", max_new_tokens=3)

    assert engine.generate(request).token_ids == engine.generate("hi", max_new_tokens=3).token_ids
    with pytest.raises(ConfigError, match="takes no settings"):
        engine.generate(engine.request("hi"), max_new_tokens=3)


def test_an_engine_reads_as_what_it_was_made_of(engine):
    named = MARAEngine("org/model", head="heads/x", top_k=5)

    assert repr(named) == "MARAEngine('org/model', head='heads/x', top_k=5)  # not loaded"
    assert repr(engine.load()).endswith("# loaded")
    assert repr(pickle.loads(pickle.dumps(named))) == repr(named)


# --- the model that a head records


def test_without_a_model_the_heads_own_is_loaded(folder_model, tmp_path):
    path = random_head(32, base_model=folder_model).save_pretrained(tmp_path / "head")

    engine = MARAEngine(head=path, max_new_tokens=3)

    assert engine.spec.model == folder_model
    assert len(engine.generate("hi").token_ids) == 3


def test_the_model_of_an_installed_package_is_found_by_the_id_that_heads_record():
    head = random_head(576, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")

    assert MARAEngine(head=head).spec.model == "smollm2"


def test_without_any_model_there_is_nothing_to_run(tmp_path):
    published = random_head(32).save_pretrained(tmp_path / "published")
    heads = [random_head(32, "residual", base_model=f"org/{name}", seed=i) for i, name in enumerate("ab")]

    with pytest.raises(ConfigError, match="no base model is named"):
        MARAEngine()
    with pytest.raises(ConfigError, match="does not record the model it was trained on"):
        MARAEngine(head=published).load()
    with pytest.raises(ConfigError, match="trained on different models: 'org/a', 'org/b'"):
        MARAEngine(head=heads).load()
    with pytest.raises(HeadError, match="no head at"):
        MARAEngine(head=tmp_path / "missing").load()


# --- batches and streams leave nothing running


def test_a_batch_with_a_prompt_that_is_refused_decodes_nothing(engine):
    with pytest.raises(ConfigError, match="the prompt has"):
        engine.generate_batch(["hello", "hello again", "x" * 600], max_new_tokens=LONG)

    assert worker_for(engine.model).decoder.is_idle


def test_a_stream_closed_before_its_first_item_leaves_nothing_running(engine):
    engine.load()

    stream = engine.stream("hello", max_new_tokens=LONG)
    stream.close()

    assert is_idle(engine)
    assert list(stream) == []


def test_a_stream_dropped_before_its_first_item_leaves_nothing_running(engine):
    engine.load()

    engine.stream("hello", max_new_tokens=LONG)

    assert is_idle(engine)


# --- close


def decoder_threads():
    return [thread for thread in threading.enumerate() if thread.name == "mara-decoder"]


def test_closing_gives_thread_and_weights_back(folder_model):
    before = decoder_threads()  # of other engines; idle ones end by themselves
    with MARAEngine(folder_model, max_new_tokens=3) as engine:
        engine.generate("hi")
        weights = weakref.ref(engine.model.model)
        (thread,) = set(decoder_threads()) - set(before)

    assert weights() is None
    assert not thread.is_alive()
    assert MARAEngine(folder_model, max_new_tokens=3).generate("hi").token_ids  # a new one loads again


def test_a_closed_engine_says_so(folder_model):
    engine = MARAEngine(folder_model)
    view = engine.with_settings(max_new_tokens=3)
    engine.close()
    engine.close()

    for call in (engine.load, lambda: view.generate("hi"), lambda: engine.outline, lambda: engine.request("hi")):
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            call()
    with pytest.raises(EngineClosedError):
        asyncio.run(engine.agenerate("hi"))
    assert "closed" in repr(engine)


def test_closing_ends_what_runs_with_an_error_and_no_one_waits(engine):
    stream = engine.stream("hi", max_new_tokens=LONG)
    next(stream)

    engine.close()

    with pytest.raises(EngineClosedError, match="closed before the reply was finished"):
        list(stream)


def test_an_engine_on_the_same_model_goes_on(engine):
    other = MARAEngine(engine.model, max_new_tokens=100)
    whole = other.generate("hi").token_ids
    stream = other.stream("hi")
    next(stream)

    engine.generate("hi")
    engine.close()

    assert list(stream)[-1].generation.token_ids == whole == other.generate("hi").token_ids


def test_a_dropped_engine_holds_nothing(folder_model):
    engine = MARAEngine(folder_model, max_new_tokens=3)
    other = MARAEngine(folder_model, max_new_tokens=3)
    engine.generate("hi")
    other.generate("hi")
    weights = weakref.ref(engine.model.model)

    del engine
    gc.collect()
    other.close()  # the last one

    assert weights() is None


# --- limits


def test_limits_are_those_of_the_model_and_shared(folder_model):
    limits = EngineLimits(max_live=2, kv_bytes=1 << 24)
    engine = MARAEngine(folder_model, limits=limits, max_new_tokens=3).load()

    assert worker_for(engine.model).limits == limits
    assert MARAEngine(folder_model).load().generate("hi", max_new_tokens=2).token_ids  # None takes what there is
    with pytest.raises(ConfigError, match=r"max_live=3, but model '.*' is running already, with max_live=2"):
        MARAEngine(folder_model, limits=EngineLimits(max_live=3)).load()


def test_limits_can_be_others_once_the_engine_is_closed(folder_model):
    with MARAEngine(folder_model, limits=EngineLimits(max_live=2)) as engine:
        engine.load()

    other = MARAEngine(folder_model, limits=EngineLimits(max_live=3)).load()

    assert worker_for(other.model).limits.max_live == 3
