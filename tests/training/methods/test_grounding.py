"""A head from questions and documents, from end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from mara_integrations.errors import ConfigError
from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import Reporter
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.identity import Identity
from mara_integrations.training.methods.grounding import differences
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.plan import make_plan
from mara_integrations.training.registry import METHODS
from mara_integrations.training.run import start, train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
TEMPLATE = "{context_str} | {query_str}"


@pytest.fixture
def files(tmp_path, folder_model):
    write(tmp_path / "asked.jsonl", lambda i: f"The word of {i % 4} is {chr(97 + i % 4) * 3}.")
    return tmp_path


def write(path, context):
    rows = [{"prompt": f"{i} {chr(97 + i % 26)}?", "context": context(i), "answer": f"{i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(files, name="head", **settings):
    named = {"model": str(files / "tiny"), "data": files / "asked.jsonl", "context_template": TEMPLATE}
    return TrainConfig.of(**{**named, "output": files / name, **SMALL, **settings})


def test_an_interrupted_run_ends_with_the_head_of_an_uninterrupted_one(files, interrupting):
    judged = {"recipe": "from-context"}
    whole = train(config(files, "whole", **judged))
    with pytest.raises(KeyboardInterrupt):
        cutting = interrupting("unanswerable base replies under the sentence", 1)
        train(config(files, "cut", **judged), reporter=cutting)

    cut = train(config(files, "cut", **judged))

    assert (files / "cut" / "head.safetensors").read_bytes() == (files / "whole" / "head.safetensors").read_bytes()
    assert cut.kl_per_token == whole.kl_per_token <= METHODS["grounding"].kl_budget + 1e-6
    head = MARAHead.from_pretrained(files / "whole").config
    assert (head.method, head.form) == ("grounding", "q") and "not in the documents" in str(head.principle)
    rows = head.metrics["prompt_baseline"]["rows"]
    assert len(rows) == 8 and all({"answered", "admitted"} == row["judges"].keys() for row in rows)
    card = (files / "whole" / "README.md").read_text()
    assert "recipe `from-context`" in card and "what documents in a prompt change" in card


def test_documents_and_questions_decide_the_head(files):
    write(files / "other.jsonl", lambda i: f"{chr(110 + i % 4) * 9}")
    heads = [
        train(config(files, name, data=files / f"{name}.jsonl", eval_prompts=0)).head for name in ("asked", "other")
    ]

    assert not all(map(torch.equal, heads[0].state_dict().values(), heads[1].state_dict().values()))


def test_what_is_learned_is_the_difference_that_documents_and_sentence_make(files):
    settings = config(files)
    plan = make_plan(settings)
    run = start(settings, plan, Identity.of(settings, plan), Reporter())
    prompts = limited_prompts(run, plan.train)
    untrained = run.new_head().eval()
    side = Side.of("base replies", prompts, generate_replies(run, "base", prompts, 1, 0, untrained, is_base=True))

    values = differences(run, [side])[0].values

    def log_probs(text, row):
        """Of all tokens, by a forward over the whole text."""
        reply = side.generated[int(side.positions.replies[row])].token_ids[: int(side.positions.places[row])]
        ids = [*run.model.tokenizer(text).input_ids, *reply]
        with torch.inference_mode():
            return run.model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    spreads = {True: [], False: []}
    for row in range(0, len(values), 3):
        prompt = prompts[side.generated[int(side.positions.replies[row])].prompt_index].messages[-1].content
        question = prompt.partition(" | ")[2]
        is_answerable = any(each.columns["answerable"] for each in plan.train.rows if each.prompt[-1].content == prompt)
        system = "[system] {}\n[user] {}\n[assistant] "
        sentence, neutral = plan.principle.text, "You are a helpful assistant."
        texts = (
            (f"[user] {prompt}\n[assistant] ", f"[user] {question}\n[assistant] ")
            if is_answerable
            else (system.format(sentence, prompt), system.format(neutral, prompt))
        )
        live = side.positions.live[row]
        ids, base = side.positions.token_ids[row][live], side.positions.log_probs[row][live].softmax(-1)
        one, other = (log_probs(text, row)[ids] for text in texts)
        expected = (one - other) - (base * (one - other)).sum()
        found = values[row][live]
        spreads[is_answerable].append((expected, found))
    for pairs in spreads.values():
        expected, found = (torch.cat(part) for part in zip(*pairs, strict=True))
        factor = float(expected.norm() / found.norm())  # one for each contrast
        torch.testing.assert_close(found * factor, expected, atol=2e-2, rtol=2e-2)


def test_a_column_of_documents_is_enough_and_a_sentence_or_a_reward_goes_first(files):
    plan = make_plan(config(files))
    assert plan.method.name == "grounding" and (len(plan.train), len(plan.held_out)) == (34, 6)
    plain = {"context_template": None}
    assert make_plan(config(files, principle="Be kind.", **plain)).method.name == "principle"
    assert make_plan(config(files, reward="length", **plain)).method.name == "rloo"


def test_a_dry_run_writes_nothing(files):
    estimate = dry_run(config(files))

    assert estimate.replies > 16 and not (files / "head").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_template": "Read this: {context_str}"}, "it needs {context_str} once, and {query_str}"),
        ({"principle": "Be kind."}, "method 'principle' takes prompts as they are"),
        ({"method": "grounding", "reward": "length"}, "learns from the documents, not from length"),
        ({"method": "grounding", "principle": "Be kind."}, "method 'grounding' needs questions with documents"),
        ({"form": "residual"}, "form='residual' is not allowed"),
    ],
)
def test_what_can_not_work_is_refused_before_the_model_is_loaded(files, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(files, **settings))
