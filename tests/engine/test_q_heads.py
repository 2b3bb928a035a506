"""Q-heads: every candidate is scored before any is fed, and what is taken is what the reference takes."""

from __future__ import annotations

import pytest
import torch
from decoding import prompt, references

from mara_integrations import MARAEngine
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.candidate_features import CandidateFeatures
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head_stacks import HeadStacks, PositionInput
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

FLAT = [1.0, 0.9, 0.8, 0.7]


def scripted_head(scores):
    """A Q-head for `ScriptedBackend` that says the same of each token everywhere."""
    head = random_head(len(scores) + 1, "q", inner_sizes=(4, len(scores)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        own = len(scores) ** 0.5  # entry of the token itself in its normalised one-hot vector; the others are below 0
        head.candidate_linear.weight[:, : len(scores)] = torch.eye(len(scores)) / own
        head.linear2.bias.copy_(torch.tensor(scores))
    return head


def test_nothing_is_fed_but_what_is_taken():
    backend = ScriptedBackend(lambda tokens: FLAT, 4)
    head = scripted_head([0.0, 0.0, 5.0, 0.0])

    done = Decoder(backend).run([Request([0], SamplingParams(max_new_tokens=3, top_p=1.0), head=head)])[0]

    assert done.token_ids == [2, 2, 2], "neither is the most probable one"
    assert [list(segment.token_ids) for segments in backend.fed for segment in segments] == [[0], [2], [2]]
    assert not any(segment.siblings for segments in backend.fed for segment in segments)
    assert (done.stats.fed, done.stats.accepted, done.stats.rejected) == (2, 3, 6)


def test_the_trace_has_an_accept_logit_of_every_candidate():
    backend = ScriptedBackend(lambda tokens: FLAT, 4)
    gate = GateParams(trace=True)
    sampling = SamplingParams(max_new_tokens=1, top_p=1.0)

    position = Decoder(backend).run([Request([0], sampling, gate, scripted_head([0.0, 0.0, 5.0, 0.0]))])[0].trace[0]

    assert position.token_ids == (0, 1, 2, 3) and position.taken == 2 and position.outcome == "accepted"
    assert len(position.accept_logits) == 4
    weights = torch.tensor(FLAT).exp() * torch.tensor([0.0, 0.0, 5.0, 0.0]).exp()
    want = [float(weights[k] / weights[k + 1 :].sum()) for k in range(3)]
    assert torch.tensor(position.accept_logits[:3]).exp().tolist() == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(("selection", "taken"), [("first", 1), ("greedy", 0), ("sample", 2)])
def test_every_rule_of_the_gate_is_there(selection, taken):
    """Probabilities .4, .35, .25: the second is the first that is accepted with more than one half."""
    backend = ScriptedBackend(lambda tokens: [0.0, 0.0, 0.0], 3)
    head = scripted_head(torch.tensor([0.4, 0.35, 0.25]).log().tolist())
    sampling = SamplingParams(max_new_tokens=1, top_p=1.0, temperature=float(selection == "sample"), seed=0)  # .84

    done = Decoder(backend).run([Request([0], sampling, GateParams(selection=selection), head)])[0]

    assert done.token_ids == [taken]


def test_repeated_text_is_drafted_and_each_drafted_token_is_judged_at_its_parent():
    script = lambda tokens: [2.0 if token == (tokens[-1] + 1) % 3 else 0.0 for token in range(4)]  # noqa: E731
    head = scripted_head([0.0, 0.0, 0.0, 0.5])  # not enough to change a token
    request = Request([0, 1, 2] * 4, SamplingParams(max_new_tokens=12, top_p=1.0), head=head)
    drafting, plain = ScriptedBackend(script, 4, can_retract=True), ScriptedBackend(script, 4)

    tokens = [Decoder(backend).run([request])[0].token_ids for backend in (drafting, plain)]

    assert tokens[0] == tokens[1] == [0, 1, 2] * 4
    assert len(drafting.fed) < len(plain.fed) - 3

    against = scripted_head([0.0, 0.0, 0.0, 9.0])  # takes 3 whatever was drafted
    refused = Request(request.prompt_ids, request.sampling, head=against)
    assert Decoder(ScriptedBackend(script, 4, can_retract=True)).run([refused])[0].token_ids == [3] * 12


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_change_no_token_of_a_model(temperature):
    model = tiny_model()
    head = random_head(32, "q", scale=0.2)
    request = Request(prompt(6) * 4, SamplingParams(max_new_tokens=24, temperature=temperature, seed=3), head=head)

    done = Decoder(make_backend(model), Scheduler(knee=200)).run([request])[0]

    assert done.token_ids == references(model, [request])[0]


class _Odd(Constraint):
    """Every other token of the vocabulary."""

    def mask(self, logits):
        logits[::2] = -torch.inf

    def accept(self, token_id):
        assert token_id % 2


def test_a_constraint_masks_before_the_head_scores():
    model, head = tiny_model(), random_head(32, "q")
    requests = [
        Request(prompt(6), SamplingParams(max_new_tokens=8, temperature=t, seed=0), head=head, constraint=_Odd())
        for t in (0.0, 1.0)
    ]
    for done in Decoder(make_backend(model)).run(requests):
        assert all(token % 2 for token in done.token_ids) and done.stats.rejected > 0


def test_prefixes_are_shared_and_log_probs_are_those_of_the_base_model():
    model, head = tiny_model(), random_head(32, "q")
    decoder = Decoder(make_backend(model))
    requests = [Request([*prompt(40), seed], SamplingParams(max_new_tokens=5, seed=seed), head=head) for seed in (1, 2)]

    first, second = (decoder.run([request])[0] for request in requests)

    assert [first.token_ids, second.token_ids] == [references(model, [request])[0] for request in requests]
    with torch.no_grad():
        whole = model(torch.tensor([[*requests[0].prompt_ids, *first.token_ids]])).logits[0].log_softmax(-1)
    want = [float(whole[40 + i, token]) for i, token in enumerate(first.token_ids)]
    assert first.log_probs == pytest.approx(want, abs=1e-3)


# --- many heads


def test_stacked_heads_score_as_each_alone():
    heads = [random_head(32, "q", seed=i, scale=0.5 + i) for i in range(6)]
    heads += [heads[1], ComposedHead({heads[1]: 0.5, heads[2]: 2.0, random_head(32, "residual"): 1.0})]
    for counts in ([3] * 8, [1, 2, 3, 4, 3, 2, 1, 5], [40, 1, 1, 1, 1, 1, 1, 1]):
        states, embeddings = torch.randn(8, 32), torch.randn(sum(counts), 32)
        inputs = [PositionInput(*row) for row in zip(heads, states, counts, strict=True)]

        token_ids = torch.arange(sum(counts))
        scores = HeadStacks().score_positions(inputs, token_ids, embeddings.__getitem__, sum(counts))

        for (head, state, count), own, got in zip(inputs, embeddings.split(counts), scores.split(counts), strict=True):
            parts = [(part, factor) for part, factor in head.parts.items() if part.config.form == "q"]
            want = sum(factor * part.score(state.expand(count, 32), own) for part, factor in parts)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [[3, 1, 7, 2], [5]], ids=["positions", "one position"])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20], ids=["nothing kept", "features kept"])
def test_one_head_for_all_scores_as_for_each(counts, kept_bytes):
    head, states = random_head(32, "q", scale=3.0), torch.randn(len(counts), 32)
    vocabulary, token_ids = torch.randn(100, 32), torch.randint(100, (sum(counts),))
    inputs = [PositionInput(head, state, count) for state, count in zip(states, counts, strict=True)]
    stacks = HeadStacks(kept_bytes)

    for _ in range(2):
        scores = stacks.score_positions(inputs, token_ids, vocabulary.__getitem__, 100)

        want = 3.0 * head.score(states.repeat_interleave(torch.tensor(counts), 0), vocabulary[token_ids])
        torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-4)


# --- what heads make of candidates


class _Embeddings:
    """Output embeddings of 100 tokens; keeps which were asked for."""

    def __init__(self):
        self.vocabulary, self.asked = torch.randn(100, 32), []

    def __call__(self, token_ids):
        self.asked += token_ids.tolist()
        return self.vocabulary[token_ids]


def test_features_of_a_token_are_made_once():
    features, embeddings, head = CandidateFeatures(1 << 20), _Embeddings(), random_head(32, "q")

    for token_ids in (torch.tensor([3, 5, 7]), torch.tensor([5, 9, 3])):
        found = features.of(head, token_ids, embeddings, 100)
        torch.testing.assert_close(found, head.candidate_features(embeddings.vocabulary[token_ids]))

    assert embeddings.asked == [3, 5, 7, 9]


def test_a_head_trained_further_makes_its_features_anew():
    features, embeddings, head = CandidateFeatures(1 << 20), _Embeddings(), random_head(32, "q")
    token_ids = torch.tensor([3, 5])
    before = features.of(head, token_ids, embeddings, 100)

    with torch.no_grad():
        head.candidate_linear.weight.mul_(2.0)
    after = features.of(head, token_ids, embeddings, 100)

    torch.testing.assert_close(after, head.candidate_features(embeddings.vocabulary[token_ids]))
    assert not torch.equal(before, after)


def test_features_are_kept_for_the_heads_used_last_as_far_as_there_is_room():
    heads, embeddings, token_ids = [random_head(32, "q", seed=i) for i in range(3)], _Embeddings(), torch.tensor([1])
    table_bytes = 100 * heads[0].candidate_linear.weight.shape[0] * 4
    features = CandidateFeatures(2 * table_bytes)

    for head in (*heads, heads[2], heads[1], heads[0]):
        features.of(head, token_ids, embeddings, 100)

    assert len(embeddings.asked) == 4, "the first one had gone when the third came"
    assert len(features._tables) == 2


def test_nothing_is_kept_where_there_is_no_room_for_a_table():
    features, embeddings, head = CandidateFeatures(1000), _Embeddings(), random_head(32, "q")

    for _ in range(2):
        features.of(head, torch.tensor([1, 2]), embeddings, 100)

    assert embeddings.asked == [1, 2, 1, 2]


def test_a_measured_decoder_keeps_features_and_gives_the_tokens_of_one_that_does_not():
    model, head = tiny_model(), random_head(32, "q")
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)

    def decoded(decoder):
        requests = [Request(prompt(6, seed=i), sampling, head=head) for i in range(3)]
        return [decoder.run([request])[0].token_ids for request in requests] + [
            sequence.token_ids for sequence in decoder.run(requests)
        ]

    decoder = Decoder.measured(make_backend(model))
    assert decoded(decoder) == decoded(Decoder(make_backend(model)))
    assert decoder._heads._features._tables


def test_a_batch_of_different_heads_gives_the_tokens_of_each_alone():
    model = tiny_model()
    requests = [
        Request(
            prompt(3 + i, seed=i),
            SamplingParams(max_new_tokens=6, temperature=0.9 * (i % 2), top_k=8, seed=i),
            GateParams(strength=0.5 + i / 8),
            random_head(32, ("q", "q", "residual", "q")[i % 4], seed=i),
        )
        for i in range(12)
    ]
    decoder = Decoder(make_backend(model), Scheduler(max_live=8))

    together = [sequence.token_ids for sequence in decoder.run(requests)]

    assert together == [references(model, [request])[0] for request in requests]


# --- backends


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "gpt_oss"])
@pytest.mark.parametrize("tied", [False, True])
def test_backends_show_the_rows_that_logits_are_made_of(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    ids = torch.tensor([5, 0, 5, 255])
    for backend in (make_backend(model), PackedBackend(model), SerialBackend(model)):
        assert torch.equal(backend.output_embeddings(ids), model.get_output_embeddings().weight[ids].detach())


def test_verify_and_composition_know_them():
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), max_new_tokens=12)
    q, other = random_head(32, "q"), random_head(32, "residual", seed=1)
    for head in (q, [q, random_head(32, "q", seed=2)], {q: 0.5, other: 0.5}):
        for temperature in (0.0, 1.0):
            assert engine.verify("hello", head=head, temperature=temperature).disagreement is None
    assert engine.generate("hello", head=[q, q]).token_ids == engine.generate("hello", head=q, strength=2.0).token_ids
