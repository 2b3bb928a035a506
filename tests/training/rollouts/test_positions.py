"""Positions of plain replies: the state before each token, its candidates, and what a Q-head says of them."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import weighted_kl
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.rollouts.positions import Positions, all_scores, q_scores
from mara_integrations.training.rollouts.replies import sample_replies


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


def written(model, head, count=3, **sampling):
    prompts = [Conversation((Message("user", "hello"[: i + 1]),)) for i in range(count)]
    return sample_replies(
        model,
        Decoder(make_backend(model.model)),
        prompts,
        sampling=SamplingParams(**{"max_new_tokens": 6, "temperature": 1.0, "top_k": 5, **sampling}),
        head=head,
        keep_positions=True,
    )


def untrained():
    return MARAHead(HeadConfig(form="q", hidden_size=32)).eval()


def test_every_position_has_the_state_that_its_logits_were_made_of(model):
    replies = written(model, untrained())
    positions = Positions.of(replies)

    assert len(positions) == sum(len(reply.positions) for reply in replies)
    assert positions.num_tokens == sum(len(reply.token_ids) for reply in replies)
    logits = model.model.lm_head(positions.states.float())
    for row, log_probs in enumerate(positions.log_probs):
        ids = positions.token_ids[row][positions.live[row]]
        torch.testing.assert_close(
            log_probs[positions.live[row]], logits[row, ids].log_softmax(-1).detach(), atol=0.03, rtol=0
        )
        reply = replies[int(positions.replies[row])]
        assert ids[positions.taken[row]] == reply.token_ids[int(positions.places[row])]


def test_scores_and_kl_are_those_of_the_gate(model):
    head, backend = random_head(32, "q"), make_backend(model.model)
    positions = Positions.of(written(model, untrained()))
    scores = all_scores(head, positions, backend.output_embeddings)

    for row in range(len(positions)):
        ids = positions.token_ids[row][positions.live[row]]
        state = positions.states[row].float().expand(len(ids), -1)
        want = head.score(state, backend.output_embeddings(ids))
        torch.testing.assert_close(scores[row][positions.live[row]], want, atol=1e-4, rtol=1e-3)
    assert not scores[~positions.live].any()
    assert (weighted_kl(positions.log_probs, scores, 0.5, positions.live) >= -1e-6).all()


def test_parts_are_joined_and_rows_taken(model):
    one, two = written(model, untrained()), written(model, untrained(), count=2, top_k=9)
    parts = [Positions.of(one), Positions.of(two)]

    joined = Positions.join(parts)

    assert len(joined) == sum(map(len, parts)) and joined.num_tokens == sum(part.num_tokens for part in parts)
    assert joined.replies.max() == 4 and joined.token_ids.shape[1] == parts[1].token_ids.shape[1]
    rows = torch.tensor([len(parts[0]), 0])
    taken = joined.take(rows)
    assert torch.equal(taken.states[0], parts[1].states[0]) and torch.equal(taken.states[1], parts[0].states[0])
    assert torch.equal(taken.live.sum(-1), torch.stack([parts[1].live[0].sum(), parts[0].live[0].sum()]))


def test_gradients_reach_state_and_candidate(model):
    head = random_head(32, "q").requires_grad_(True)
    positions = Positions.of(written(model, untrained()))
    q_scores(head, positions.states, positions.token_ids, make_backend(model.model).output_embeddings).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())
