"""vLLM with the plug-in: each request gets the tokens of the gate under its own head, and all else stays as it was."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mara_integrations.engine.oracle.reference import decide_reference, generate_reference
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.timeout(900),  # vLLM starts in 20 s on an idle machine
]
TOKENS = 12


def prompt(length, seed=0):
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(6 + 3 * i, seed=i) for i in range(6)]


def params(head=None, strength=1.0, **settings):
    import vllm

    asked = {"mara": {"head": head, "strength": strength}} if isinstance(head, str) else head
    return vllm.SamplingParams(
        **{"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "extra_args": asked, **settings}
    )


def replies(llm, prompts, requests):
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], requests, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(served, prompts, heads, strength=1.0):
    sampling = SamplingParams(max_new_tokens=TOKENS, top_k=8)
    gate = GateParams(strength=strength)
    return [generate_reference(served[1], ids, head, sampling, gate) for ids, head in zip(prompts, heads, strict=True)]


def test_greedy_replies_are_those_of_our_engine(llm, served):
    heads = [served[2]["q0"]] * len(PROMPTS)
    got = replies(llm, PROMPTS, [params("q0")] * len(PROMPTS))
    assert got == expected(served, PROMPTS, heads)
    assert got != expected(served, PROMPTS, [None] * len(PROMPTS)), "the head changes something"


def test_every_request_of_a_batch_has_its_own_head(llm, served):
    own = served[2]
    asked = [
        params("q0"),
        params("q1", strength=0.5),
        params(None),
        params("wide"),
        params({"mara_head": ["q0", "wide"], "mara_weights": [0.5, 1], "mara_top_k": 8}),
        params("q2"),
    ]
    composed = ComposedHead({own["q0"]: 0.5, own["wide"]: 1.0})
    heads = [own["q0"], own["q1"], None, own["wide"], composed, own["q2"]]
    want = [
        expected(served, [ids], [head], 0.5 if i == 1 else 1.0)[0]
        for i, (ids, head) in enumerate(zip(PROMPTS, heads, strict=True))
    ]
    assert replies(llm, PROMPTS, asked) == want


def test_requests_that_come_and_go_keep_their_heads(llm, served):
    names = ["q0", "q1", "wide", "q2"]
    lengths = [3, 9, 5, 12, 4, 8, 11]
    prompts = [prompt(4 + i, seed=i) for i in range(len(lengths))]
    picks = [names[i % 4] for i in range(len(lengths))]
    requests = [params(name, max_tokens=length) for name, length in zip(picks, lengths, strict=True)]
    want = expected(served, prompts, [served[2][name] for name in picks])
    got = replies(llm, prompts, requests)
    assert got == [reply[:length] for reply, length in zip(want, lengths, strict=True)]


def test_strength_0_and_no_head_are_vllm_alone(llm):
    plain = replies(llm, PROMPTS, [params(None)] * 6)
    assert replies(llm, PROMPTS, [params("q0", strength=0.0)] * 6) == plain
    assert replies(llm, PROMPTS, [params("q0"), *[params(None)] * 5])[1:] == plain[1:]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
def test_samples_are_of_the_gates_distribution(llm, served, temperature):
    head, count = served[2]["q1"], 2000
    asked = params("q1", strength=0.3, temperature=temperature, max_tokens=1, seed=7, n=count)
    [output] = llm.generate([{"prompt_token_ids": PROMPTS[0]}], [asked], use_tqdm=False)
    drawn = Counter(reply.token_ids[0] for reply in output.outputs)

    sampling = SamplingParams(top_k=8, top_p=0.95, temperature=temperature)
    position = decide_reference(served[1], PROMPTS[0], head, sampling, GateParams(strength=0.3), 0.5)
    weights = [p * math.exp(q) for p, q in zip(position.probs, position.scores, strict=True)]
    want = {token: weight / sum(weights) for token, weight in zip(position.candidates, weights, strict=True)}

    assert set(drawn) <= set(want)
    distance = sum(abs(drawn[token] / count - probability) for token, probability in want.items()) / 2
    assert distance < 0.05


def test_a_seed_repeats_a_reply(llm):
    asked = [params("q0", strength=0.2, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    one, same, other = replies(llm, [PROMPTS[1]] * 3, asked)
    assert one == same != other


def test_log_probabilities_are_the_base_models(llm, served):
    asked = params("q0", logprobs=4, max_tokens=3)
    [output] = llm.generate([{"prompt_token_ids": PROMPTS[2]}], [asked], use_tqdm=False)
    reply = output.outputs[0]
    tokens = list(PROMPTS[2])
    for token, shown in zip(reply.token_ids, reply.logprobs, strict=True):
        with torch.no_grad():
            want = served[1](torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert token in shown
        for seen, value in shown.items():
            assert value.logprob == pytest.approx(float(want[seen]), abs=1e-3)
        tokens.append(token)


def test_a_shared_beginning_is_read_once_whatever_the_head(llm, served):
    long = prompt(160, seed=9)
    prompts = [[*long, 5], [*long, 6]]
    [first] = replies(llm, prompts[:1], [params("q0")])
    [output] = llm.generate([{"prompt_token_ids": prompts[1]}], [params("q1")], use_tqdm=False)
    assert output.num_cached_tokens >= 128
    got = [first, list(output.outputs[0].token_ids)]
    assert got == expected(served, prompts, [served[2]["q0"], served[2]["q1"]])


def test_a_grammar_holds_and_the_head_chooses_within_it(llm):
    from vllm.sampling_params import StructuredOutputsParams

    form = StructuredOutputsParams(regex="[a-f]{6}")
    asked = [params(head, ignore_eos=False, structured_outputs=form) for head in ("q0", "q1", "q2", "wide")]
    outputs = llm.generate([{"prompt_token_ids": PROMPTS[0]}] * 4, asked, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert all(len(text) == 6 and set(text) <= set("abcdef") for text in texts)
    assert len(set(texts)) > 1


def test_what_else_changes_logits_comes_before_the_head(llm):
    [forced, allowed] = replies(
        llm, PROMPTS[:2], [params("q0", logit_bias={77: 100.0}), params("q0", allowed_token_ids=[3, 4, 5])]
    )
    assert set(forced) == {77}
    assert set(allowed) <= {3, 4, 5}


BAD = [
    ({"mara": {"head": "absent"}}, "no head 'absent' is served .*q0, q1"),
    ({"mara": {"head": "../heads/q0"}}, "no head '../heads/q0' is served"),
    ({"mara": {"head": "afterstate"}}, "'residual' form can't run in vLLM"),
    ({"mara": {"head": "narrow"}}, "head 'narrow' expects hidden size 48; model 'tiny' has 64"),
    ({"mara": {"head": "q0", "strength": -1.0}}, "strength=-1.0 is not allowed"),
    ({"mara": {"head": "q0", "strength": float("nan")}}, "strength=nan is not allowed"),
    ({"mara": {"haed": "q0"}}, "did you mean head"),
    ({"mara": {"strength": 0.5}}, "head=None is not allowed"),
    ({"mara": "q0"}, "mara='q0' is not allowed"),
    ({"mara_head": ["q0", "q1"], "mara_weights": [1.0]}, "a number for each head"),
    ({"mara_head": "q0", "mara_top_p": 2.0}, "top_p=2.0 is not allowed"),
]


@pytest.mark.parametrize(("extra_args", "said"), BAD, ids=[said[:20] for _, said in BAD])
def test_a_request_that_can_not_be_gated_is_refused_alone(llm, served, extra_args, said):
    from vllm.exceptions import VLLMValidationError

    engine = llm.llm_engine
    engine.add_request("before", {"prompt_token_ids": PROMPTS[0]}, params("q0"))
    with pytest.raises(VLLMValidationError, match=said) as refused:  # status 400 over HTTP
        engine.add_request("bad", {"prompt_token_ids": PROMPTS[1]}, params(extra_args))
    engine.add_request("after", {"prompt_token_ids": PROMPTS[2]}, params("q1"))
    assert str(served[0]) not in str(refused.value)

    done = {}
    while engine.has_unfinished_requests():
        done |= {out.request_id: list(out.outputs[0].token_ids) for out in engine.step() if out.finished}
    own = [served[2]["q0"], served[2]["q1"]]
    assert list(done.values()) == expected(served, [PROMPTS[0], PROMPTS[2]], own)


def test_a_head_that_is_replaced_holds_for_the_next_request(llm, served):
    old, new = (random_head(64, "q", seed=seed, top_k=8, scale=4.0) for seed in (20, 21))
    for head in (old, new):
        head.save_pretrained(served[0] / "heads" / "changing")
        assert replies(llm, PROMPTS[:2], [params("changing")] * 2) == expected(served, PROMPTS[:2], [head] * 2)


def test_a_request_whose_head_is_lost_ends_instead_of_going_on_without(llm, served, monkeypatch):
    import mara_integrations.vllm.batch as batch
    from mara_integrations.errors import HeadError

    def lost(*_):
        raise HeadError("gone")

    monkeypatch.setattr(batch, "gated_request", lost)
    ended = params("q0", ignore_eos=False)
    [reply, other] = replies(llm, PROMPTS[:2], [ended, params(None)])
    monkeypatch.undo()
    assert reply == [0]  # the end of a reply
    assert len(other) == TOKENS


def test_the_second_model_runners_interface_gates_alike(llm, served):
    """This runner needs a GPU: only its calls are made here."""
    import numpy as np

    from mara_integrations.vllm.processor import GateProcessor

    processor = GateProcessor(llm.llm_engine.vllm_config, SimpleNamespace(device=torch.device("cpu")))
    slots = {7: "q0", 2: None, 4: "wide"}
    assert [processor.add_request(slot, params(name)) for slot, name in slots.items()] == [True, False, True]

    order = [4, 7, 2]
    ids = [PROMPTS[i] for i in range(3)]
    with torch.no_grad():
        states = torch.stack([served[1].model(torch.tensor([one])).last_hidden_state[0, -1] for one in ids])
    logits = llm.apply_model(lambda model: model.compute_logits(states))[0]
    before = logits.clone()
    gated = processor.apply(logits, SimpleNamespace(idx_mapping_np=np.array(order)))

    assert torch.equal(gated[2], before[2])
    want = expected(served, ids[:2], [served[2]["wide"], served[2]["q0"]])
    assert gated[:2].argmax(-1).tolist() == [reply[0] for reply in want]


def test_speculative_decoding_is_refused_by_name(served, environment):
    import vllm

    with pytest.raises(Exception, match="heads can't run with speculative decoding"):
        vllm.LLM(
            str(served[0] / "tiny"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
        )
