"""Many heads at once decide as each alone would, and composed ones as their sum; a thousand stay in memory."""

from __future__ import annotations

import threading

import pytest
import torch
from decoding import reference

from mara_integrations import MARALLM, ChatMARA, MARAEngine
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head_stacks import HeadInput, HeadStacks
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.cache import HeadCache
from mara_integrations.heads.compose import ComposedHead, trained_settings
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

FORMS = ("paper", "residual", "value")


def prompt(length, seed=0):
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def shown(head, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return HeadInput(head, torch.randn(width, 32, generator=generator), torch.randn(32, generator=generator))


def approx(logits):
    return pytest.approx(logits, abs=1e-3)  # how many candidates are fed at once decides about the last digits


def one_by_one(items):
    return [
        sum(factor * part.score(states, previous.expand_as(states)) for part, factor in head.parts.items())
        for head, states, previous in items
    ]


def assert_scores(items, scores):
    for want, got in zip(one_by_one(items), scores, strict=True):
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [[1] * 8, [3, 1, 2, 4, 1, 1, 3, 2], [30, 1, 1, 1, 1, 1, 1, 1]], ids=str)
def test_stacked_heads_score_as_each_alone(widths):
    heads = [random_head(32, FORMS[i % 3], seed=i, scale=0.5 + i) for i in range(6)]
    heads += [heads[1], ComposedHead({heads[1]: 0.5, heads[2]: 2.0})]
    items = [shown(head, width, seed) for seed, (head, width) in enumerate(zip(heads, widths, strict=True))]

    assert_scores(items, HeadStacks().score(items))
    assert HeadStacks().score([]) == []


def test_heads_come_and_go_between_steps():
    heads, stacks = [random_head(32, "residual", seed=i) for i in range(12)], HeadStacks()
    for step in range(24):
        asked = [heads[(step + k) % 12] for k in range(1 + step % 5)]
        items = [shown(head, 1 + k % 2, seed=step) for k, head in enumerate(asked)]
        assert_scores(items, stacks.score(items))


def test_a_head_trained_further_is_not_remembered_as_it_was():
    heads, stacks = [random_head(32, "residual", seed=i) for i in range(3)], HeadStacks()
    items = [shown(head, 2) for head in heads]
    before = stacks.score(items)

    with torch.no_grad():
        heads[1].output_linear.weight.mul_(2.0)

    after = stacks.score(items)
    assert_scores(items, after)
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_damaged_head_leaves_nothing_behind_in_a_stack(is_first):
    damaged = random_head(32, "residual", seed=9)
    del damaged.linear1
    heads = [random_head(32, "residual", seed=i) for i in range(2)]
    items = [shown(head, 2, i) for i, head in enumerate([damaged, *heads] if is_first else [*heads, damaged])]
    stacks = HeadStacks()

    with pytest.raises(AttributeError, match="linear1"):
        stacks.score(items)

    composed = shown(ComposedHead({head: 1.0 for head in heads}), 2)
    assert_scores([composed], stacks.score([composed]))


def test_a_batch_of_different_heads_gives_the_tokens_of_each_alone():
    model = tiny_model()
    requests = [
        Request(
            prompt(3 + i, seed=i),
            SamplingParams(max_new_tokens=6, temperature=0.9 * (i % 2), top_k=8, seed=i),
            head=random_head(32, FORMS[i % 3], accept_rate=0.4, seed=i),
        )
        for i in range(16)
    ]
    decoder = Decoder(make_backend(model), Scheduler(max_live=8))

    together = [sequence.token_ids for sequence in decoder.run(requests)]

    assert together == [decoder.run([request])[0].token_ids for request in requests]
    assert together == [reference(model, r.prompt_ids, r.head, r.sampling, r.gate) for r in requests]


def test_composed_heads_give_the_reference_tokens_beside_single_ones():
    model = tiny_model()
    one, two, lone = (random_head(32, form, seed=i) for i, form in enumerate(("residual", "value", "residual")))
    heads = [ComposedHead({one: 1.0, two: 0.5}), lone, ComposedHead({two: 0.2, lone: 0.3, one: 0.1})]
    requests = [
        Request(prompt(5 + i, i), SamplingParams(max_new_tokens=8, temperature=t, top_k=8, seed=i), GateParams(), head)
        for i, head in enumerate(heads)
        for t in (0.0, 1.0)
    ]

    replies = [sequence.token_ids for sequence in Decoder(make_backend(model)).run(requests)]

    assert replies == [reference(model, r.prompt_ids, r.head, r.sampling, r.gate) for r in requests]
    alone = [Request(r.prompt_ids, r.sampling, r.gate, one) for r in requests]
    assert replies != [sequence.token_ids for sequence in Decoder(make_backend(model)).run(alone)]


def test_a_composition_of_one_is_a_strength():
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), max_new_tokens=20, trace=True)
    head = random_head(32, "residual")

    def logits(**settings):
        return [logit for p in engine.generate("hi", **settings).trace for logit in p.accept_logits]

    assert logits(head={head: 0.5}) == approx(logits(head=head, strength=0.5))
    assert logits(head=[head, head]) == approx(logits(head=head, strength=2.0))
    assert logits(head=[head]) == approx(logits(head=head))
    assert logits(head={head: 1.0, random_head(32, "value"): 0.0}) == approx(logits(head=head))
    assert logits(head={head: 0.0}) == [] == logits(head=None)


@pytest.mark.parametrize(
    ("head", "error", "said"),
    [
        ({"paper": 1.0, "residual": 1.0}, ConfigError, "'paper' head can be neither weighed nor composed"),
        ({"paper": 0.5}, ConfigError, "nothing to add"),
        (["residual", "wide"], HeadError, "hidden size 48"),
        (["residual", "narrow"], ConfigError, "different top_k: 40 and 3"),
        (["residual", "missing"], HeadError, "no head at 'missing'"),
        ({"residual": -1.0}, ConfigError, "'residual' has the weight -1.0"),
        ({"residual": "1"}, ConfigError, "'residual' has the weight '1'"),
        ([], ConfigError, r"head=\[\] is not allowed"),
        ([3], ConfigError, r"head=\[3\] is not allowed"),
        (3, ConfigError, "head=3 is not allowed"),
    ],
    ids=str,
)
def test_what_does_not_add_up_is_refused_with_a_reason(tmp_path, monkeypatch, head, error, said):
    monkeypatch.chdir(tmp_path)
    random_head(32, "paper").save_pretrained("paper")
    random_head(32, "residual").save_pretrained("residual")
    random_head(48, "residual").save_pretrained("wide")
    random_head(32, "residual", top_k=3).save_pretrained("narrow")
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), max_new_tokens=2)

    with pytest.raises(error, match=said):
        engine.generate("hi", head=head)


def test_the_wrong_head_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="head=3 is not allowed"):
        ChatMARA("smollm2", head=3)
    with pytest.raises(ConfigError, match="has the weight -1"):
        ChatMARA("smollm2", head={"heads/a": -1})


def test_the_widest_demand_for_alternatives_holds_and_other_differences_have_to_be_settled():
    one, two = random_head(32, "residual", min_candidates=2), random_head(32, "value", top_k=3, seed=1)
    composed = ComposedHead({one: 1.0, two: 1.0})

    with pytest.raises(ConfigError, match="different top_k: 40 and 3"):
        trained_settings(composed, {})
    assert trained_settings(composed, {"top_k": 7})["min_candidates"] == 2
    assert trained_settings(two, {}) == {"min_candidates": 1, "top_k": 3, "top_p": 0.95}


def test_system_prompts_of_composed_heads_have_to_agree_where_there_are_several():
    brief, kind, free = (
        random_head(32, "residual", seed=i, system_prompt=prompt)
        for i, prompt in enumerate(("Be brief.", "Be kind.", None))
    )

    with pytest.raises(ConfigError, match=r"different system_prompt: 'Be brief.' and 'Be kind.'"):
        trained_settings(ComposedHead({brief: 1.0, kind: 1.0}), {})
    assert trained_settings(ComposedHead({brief: 1.0, free: 1.0}), {})["system_prompt"] == "Be brief."


def test_a_chat_model_composes_per_call_and_caches_by_weights(tmp_path):
    names = [str(tmp_path / name) for name in ("one", "two")]
    for seed, name in enumerate(names):
        random_head(32, "residual", seed=seed).save_pretrained(name)
    llm = ChatMARA((tiny_model(), tiny_tokenizer()), head=names, max_tokens=20)

    def logits(llm, **call):
        trace = llm.invoke("hi", trace=True, **call).response_metadata["trace"]
        asked = [candidate["accept_logit"] for position in trace for candidate in position["candidates"]]
        return [logit for logit in asked if logit is not None]

    even = approx(logits(llm))
    assert logits(llm, head=dict.fromkeys(names, 1.0)) == even
    assert logits(llm.bind(head=names)) == even
    assert logits(llm, head={names[0]: 1.0, names[1]: 0.5}) != even
    keys = [llm._get_llm_string(head=head) for head in (names, names[0], {names[0]: 1.0, names[1]: 0.5}, None)]
    assert len(set(keys)) == 4 and llm._get_llm_string() == keys[0]
    assert llm._identifying_params["head"] == f"{names[0]} + {names[1]}"
    both = MARALLM(llm.model, max_tokens=20)
    assert both.complete("hi", head=names).text == both.invoke("hi", head=names).text == llm.invoke("hi").text


def test_a_recalibrated_head_shares_no_cached_answers(tmp_path):
    head = random_head(32, "residual")
    keys = [ChatMARA("smollm2", head=head.save_pretrained(tmp_path))._get_llm_string()]
    head.config = head.config.model_copy(update={"scale": 2.0})
    keys += [ChatMARA("smollm2", head=head.save_pretrained(tmp_path))._get_llm_string()]
    assert keys[0] != keys[1]


def test_a_thousand_heads_stay_within_their_bytes(tmp_path):
    size = random_head(32, "residual", inner_sizes=(8, 2)).num_bytes
    for seed in range(20):
        random_head(32, "residual", inner_sizes=(8, 2), seed=seed).save_pretrained(tmp_path / f"{seed}")
    cache = HeadCache(max_bytes=6 * size)
    assert HeadCache().max_bytes > 1000 * random_head(576, "residual", inner_sizes=(1024, 256)).num_bytes

    heads = [cache.get(tmp_path / f"{seed}") for seed in range(20)]

    assert len(cache) == 6 and cache.num_bytes == 6 * size
    assert cache.get(tmp_path / "19") is heads[19] and cache.get(tmp_path / "14") is heads[14]
    assert cache.get(tmp_path / "0") is not heads[0], "the least recently used went first"
    assert cache.get(tmp_path / "15") is not heads[15]
    assert cache.num_bytes == 6 * size
    random_head(32, "residual", inner_sizes=(8, 2), seed=5).save_pretrained(tmp_path / "19")
    assert cache.get(tmp_path / "19") is not heads[19], "it was trained again"


def test_loading_a_head_stops_no_request(tmp_path, monkeypatch):
    random_head(32, "residual").save_pretrained(tmp_path / "slow")
    model = (tiny_model(), tiny_tokenizer())
    engine, quick = MARAEngine(model, max_new_tokens=5), random_head(32, "residual", seed=1)
    loading, may_load = threading.Event(), threading.Event()
    read = HeadCache.get.__globals__["MARAHead"].from_pretrained

    def slow(source):
        loading.set()
        assert may_load.wait(30)
        return read(source)

    monkeypatch.setattr("mara_integrations.heads.cache.MARAHead.from_pretrained", slow)
    replies = []
    waiting = threading.Thread(target=lambda: replies.append(engine.generate("hi", head=tmp_path / "slow")))
    waiting.start()
    assert loading.wait(30)
    try:
        assert len(engine.generate("hi", head=quick).token_ids) == 5
        assert not replies, "the other is still being read"
    finally:
        may_load.set()
        waiting.join(30)
    assert len(replies[0].token_ids) == 5
