"""DPO and KTO: what pairs and labels teach a head, end to end, interrupted, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from mara_integrations.errors import ConfigError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.learning.fit import FitSettings, fit
from mara_integrations.training.learning.objectives import dpo_loss, kto_loss
from mara_integrations.training.methods.preference import LabelledDecisions
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.rollouts.replies import read_replies
from mara_integrations.training.run import train

STORE = "mara_integrations.training.records.store"


def planted(num_pairs, seed, group):
    """Good replies accept what has a positive first coordinate, bad ones reject it, and some of both is noise."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * num_pairs
    counts = torch.randint(3, 7, (n,), generator=generator)
    total = int(counts.sum())
    states = torch.randn(total, 16, generator=generator)
    good = torch.arange(n) % 2 == 0
    follows = (states[:, 0] > 0) == good.repeat_interleave(counts)
    noise = torch.rand(total, generator=generator) < 0.2
    decisions = Decisions(states.half(), torch.zeros(total), follows ^ noise, torch.zeros(total).long(), counts)
    return LabelledDecisions(good, group, decisions)


@pytest.mark.parametrize(
    ("group", "loss"),
    [
        (2, lambda head, pairs: dpo_loss(pairs.log_ratios(head)[0::2], pairs.log_ratios(head)[1::2], 0.3)),
        (1, lambda head, replies: kto_loss(replies.log_ratios(head), replies.good, 0.3, 1.0)),
    ],
    ids=["dpo", "kto"],
)
def test_unseen_replies_are_told_apart_by_what_good_ones_do(group, loss):
    torch.manual_seed(0)
    head = MARAHead(HeadConfig(form="residual", hidden_size=16, inner_sizes=(64, 16)))
    held_out = planted(50, 2, group)
    settings = FitSettings(epochs=10, learning_rate=3e-3, batch_size=16)
    epochs = fit(head, planted(200, 1, group), held_out, loss, settings, lambda epoch: None)
    assert min(epoch.held_out_loss for epoch in epochs) < 0.8 * epochs[0].held_out_loss
    with torch.no_grad():
        ratios = held_out.log_ratios(head)
    assert float((ratios[0::2] > ratios[1::2]).float().mean()) > 0.85


def test_an_example_is_a_whole_pair():
    pairs = planted(5, 0, 2)
    taken = pairs.take(torch.tensor([3, 1]))
    assert len(pairs) == 5 and len(taken) == 2 and taken.good.tolist() == [True, False] * 2
    assert taken.decisions.counts.tolist() == pairs.decisions.counts[[6, 7, 2, 3]].tolist()


@pytest.fixture
def files(tmp_path):
    """A model, pairs and labelled replies: good ones have vowels."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    pairs = [{"prompt": f"{i}?", "chosen": f"aeio u{i}a", "rejected": f"bcdf g{i}k"} for i in range(20)]
    labelled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("labels", labelled)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(files, data, output="head", **values):
    defaults = {"max_reply_tokens": 8, "epochs": 4, "inner_size": 64, "eval_prompts": 2, "learning_rate": 3e-3}
    return TrainConfig.of(
        model=str(files / "tiny"), data=files / f"{data}.jsonl", output=files / output, **defaults | values
    )


@pytest.mark.parametrize(
    ("method", "data", "competitors"),
    [("dpo", "pairs", 0), ("dpo", "pairs", 3), ("kto", "labels", 0), ("kto", "pairs", 0)],
)
def test_a_head_is_trained_from_end_to_end(files, method, data, competitors):
    result = train(settings(files, data, method=method, form="residual", competitors=competitors))
    assert result.head.config.form == "residual" and result.head.config.method == method
    assert 0 < result.head.config.scale <= 1.0, "no stronger than it was fitted"
    assert result.kl_per_token <= 0.16 and result.held_out_accuracy.mean > 0.9, "vowels are easy to tell"


def test_interrupted_reading_goes_on_to_the_same_head(interrupting, files, monkeypatch):
    monkeypatch.setattr("mara_integrations.training.collect.given._REPLIES_PER_FILE", 8)
    whole = train(settings(files, "pairs", "whole", method="dpo", eval_prompts=0))
    monkeypatch.setattr(f"{STORE}.cache_dir", lambda: files / "cache")
    with pytest.raises(KeyboardInterrupt):
        train(
            settings(files, "pairs", "broken", method="dpo", eval_prompts=0), reporter=interrupting("given replies", 20)
        )
    assert len(list((files / "cache").rglob("*.pt"))) == 2
    resumed = train(settings(files, "pairs", "broken", method="dpo", eval_prompts=0))
    assert resumed.head.fingerprint == whole.head.fingerprint


def test_what_one_method_has_read_no_other_reads_again(files, monkeypatch):
    monkeypatch.setattr(f"{STORE}.cache_dir", lambda: files / "cache")
    num_read = []

    def counted(model, backend, replies, **kwargs):
        num_read.append(len(replies))
        return read_replies(model, backend, replies, **kwargs)

    monkeypatch.setattr("mara_integrations.training.collect.given.read_replies", counted)
    count = 2 * len((files / "pairs.jsonl").read_text().splitlines())
    expected = [dry_run(settings(files, "pairs", "kto", method="kto")).expected]
    train(settings(files, "pairs", "kto", method="kto", eval_prompts=0))
    expected.append(dry_run(settings(files, "pairs", "dpo", method="dpo")).expected)
    assert sum(num_read) == count
    cached = train(settings(files, "pairs", "dpo", method="dpo", eval_prompts=0)).head.fingerprint
    assert sum(num_read) == count, "nothing was read again"
    assert expected[1].cached - expected[0].cached >= count
    monkeypatch.setattr(f"{STORE}.cache_dir", lambda: files / "empty")
    assert train(settings(files, "pairs", "anew", method="dpo", eval_prompts=0)).head.fingerprint == cached
    assert sum(num_read) == 2 * count


@pytest.mark.parametrize("method", ["dpo", "kto", "value"])
def test_heads_look_at_the_state_before_a_candidate_unless_a_form_is_named(files, method):
    assert make_plan(settings(files, "pairs", method=method)).method.form == "q"
    other = "value" if method == "value" else "residual"
    assert make_plan(settings(files, "pairs", method=method, form=other)).method.form == other


def test_competitors_are_for_heads_that_are_fed_candidates(files):
    with pytest.raises(ConfigError, match=r"competitors=3 is not allowed: .*scores all candidates .*--form residual"):
        make_plan(settings(files, "pairs", method="dpo", competitors=3))


@pytest.mark.parametrize("method", ["dpo", "kto", "value"])
def test_losses_that_destroy_the_paper_forms_prior_are_refused(files, method):
    with pytest.raises(ConfigError, match=rf"method '{method}' trains heads of the form .* replaces the base model's"):
        make_plan(settings(files, "pairs", method=method, form="paper"))


def test_dpo_needs_pairs(files):
    with pytest.raises(ConfigError, match="'dpo' needs preference pairs; given are labelled replies"):
        make_plan(settings(files, "labels", method="dpo"))
