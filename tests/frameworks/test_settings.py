"""The settings of `MARALLM` and `ChatMARA`: where they hold, and what happens when they change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from mara_integrations import MARALLM, ChatMARA
from mara_integrations.errors import ConfigError, EngineClosedError, HeadError
from mara_integrations.messages import Message
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


def test_the_engine_of_an_llm_answers_as_the_llm_does(loaded: tuple[Any, Any]) -> None:
    head = random_head(32, "residual")
    llm = MARALLM(loaded, head=head, strength=0.25, system_prompt="Be brief.", top_k=7, min_candidates=2, max_tokens=5)

    request = llm.engine.request("hi")

    assert llm.engine.head is request.head is head
    assert (request.gate.strength, request.sampling.top_k, request.sampling.min_candidates) == (0.25, 7, 2)
    assert request.sampling.max_new_tokens == 5
    assert request.prompt_ids == llm.engine.encode([Message("system", "Be brief."), Message("user", "hi")])
    assert llm.engine.generate("hi").text == llm.complete("hi").text == llm.invoke("hi").content
    assert llm.engine.verify("hi").token_ids == tuple(llm.complete("hi").raw["token_ids"])


@pytest.mark.parametrize("kind", [MARALLM, ChatMARA])
def test_an_assigned_head_holds_at_once_and_everywhere(kind: Any, loaded: tuple[Any, Any]) -> None:
    one, two = (random_head(32, "residual", seed=seed) for seed in (1, 2))
    llm = kind(loaded, head=one, max_tokens=12)
    of_two = kind(loaded, head=two, max_tokens=12).invoke("hi").content
    assert llm.invoke("hi").content != of_two

    llm.head = two

    assert llm.invoke("hi").content == of_two == llm.engine.generate("hi").text
    assert llm.engine.head is two


def test_a_head_assigned_after_a_typo_works(loaded: tuple[Any, Any], tmp_path: Any) -> None:
    path = random_head(32, "residual").save_pretrained(tmp_path)
    llm = MARALLM(loaded, head="no-such-head", max_tokens=3)
    with pytest.raises(HeadError, match="no-such-head"):
        llm.complete("hi")

    llm.head = path

    assert llm.complete("hi").raw["token_ids"]


def test_a_head_brings_its_system_prompt_to_both_frameworks(loaded: tuple[Any, Any], tmp_path: Any) -> None:
    path = random_head(32, "residual", system_prompt="Be brief.").save_pretrained(tmp_path)
    told = len("[system] Be brief.\n")
    llm = MARALLM(loaded, head=path, max_tokens=3)

    def prompt_tokens(llm: MARALLM) -> set[int]:
        usage = llm.invoke("hi").usage_metadata
        assert usage is not None
        return {usage["input_tokens"], llm.complete("hi").raw["usage"]["prompt_tokens"]}

    (with_it,), (without,) = prompt_tokens(llm), prompt_tokens(llm.model_copy(update={"system_prompt": ""}))
    assert with_it == without + told


def test_arguments_of_hosted_models_warn_that_they_do_nothing() -> None:
    with pytest.warns(UserWarning, match="api_key, max_retries, timeout of MARALLM: without effect") as caught:
        MARALLM("smollm2", timeout=5, max_retries=2, api_key="secret")

    assert len(caught) == 1
    assert caught[0].filename == __file__ and "secret" not in str(caught[0].message)


def test_an_argument_at_one_place_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ChatMARA("smollm2", timeout=5)

    assert len(caught) == 1


@pytest.mark.parametrize("kind", [MARALLM, ChatMARA])
def test_a_model_has_to_be_named_by_somebody(kind: Any, folder_model: str, tmp_path: Any) -> None:
    path = random_head(32, base_model=folder_model).save_pretrained(tmp_path / "head")

    with pytest.raises(ConfigError, match="no base model is named"):
        kind()
    llm = kind(head=path, max_tokens=3)
    assert llm.model_name == folder_model
    assert llm.invoke("hi").response_metadata["model_name"] == folder_model
    assert "head" in repr(kind(head="no/such-head"))  # reads nothing


def test_another_head_may_bring_another_model(tmp_path: Any) -> None:
    paths = []
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / f"model{seed}")
        tiny_tokenizer().save_pretrained(tmp_path / f"model{seed}")
        head = random_head(32, base_model=str(tmp_path / f"model{seed}"))
        paths.append(head.save_pretrained(tmp_path / f"head{seed}"))
    llm = MARALLM(head=paths[0], max_tokens=2)
    llm.complete("hi")

    llm.head = paths[1]

    assert llm.complete("hi").raw["model_name"] == str(tmp_path / "model1")


def test_values_that_change_nothing_are_taken(loaded: tuple[Any, Any]) -> None:
    llm = MARALLM(loaded, max_tokens=3)

    assert llm.complete("hi", n=1, frequency_penalty=0.0).text == llm.complete("hi").text
    assert llm.invoke("hi", n=1).content == llm.invoke("hi").content
    with pytest.raises(ConfigError, match="n=2 is not supported"):
        llm.complete("hi", n=2)


def test_closing_an_llm_closes_its_copies(loaded: tuple[Any, Any]) -> None:
    with MARALLM(loaded, max_tokens=3) as llm:
        llm.complete("hi")
        twin = llm.model_copy(update={"max_tokens": 2})

    for call in (lambda: llm.complete("hi"), lambda: llm.invoke("hi"), lambda: twin.complete("hi")):
        with pytest.raises(EngineClosedError):
            call()


def test_limits_are_given_as_a_mapping_and_checked(folder_model: str) -> None:
    llm = MARALLM(folder_model, limits={"max_live": 2, "prefix_cache_bytes": 0}, max_tokens=2)

    assert llm.complete("hi").raw["token_ids"]
    assert llm.engine.limits is not None and llm.engine.limits.max_live == 2
    with pytest.raises(ConfigError, match="max_live=0 is not allowed"):
        MARALLM(folder_model, limits={"max_live": 0})
    with pytest.raises(ConfigError, match="max_life"):
        MARALLM(folder_model, limits={"max_life": 2})
