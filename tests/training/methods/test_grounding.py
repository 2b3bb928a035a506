"""A head from questions and documents, from end to end on a tiny model."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from mara_integrations.errors import ConfigError, DataError
from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import Reporter
from mara_integrations.runtime import MARAEngine
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.identity import Identity
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.methods import missing_answers
from mara_integrations.training.methods.grounding import GroundingLearner, differences
from mara_integrations.training.methods.missing_answers import Asked, given_to, read_sentence
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.plan import make_plan
from mara_integrations.training.registry import METHODS
from mara_integrations.training.rollouts.positions import GivenPositions
from mara_integrations.training.run import start, train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
TEMPLATE = "{context_str} | {query_str}"
SAYS = {"missing_answer": "no", "top_k": 1000, "top_p": 1.0}


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
        cutting = interrupting("base replies without documents", 1)
        train(config(files, "cut", **judged), reporter=cutting)

    cut = train(config(files, "cut", **judged))

    assert (files / "cut" / "head.safetensors").read_bytes() == (files / "whole" / "head.safetensors").read_bytes()
    assert cut.kl_per_token == whole.kl_per_token <= METHODS["grounding"].kl_budget + 1e-6
    head = MARAHead.from_pretrained(files / "whole").config
    assert (head.method, head.form, head.principle) == ("grounding", "q", None)
    rows = head.metrics["prompt_baseline"]["rows"]
    assert len(rows) == 8 and all({"answered", "admitted"} == row["judges"].keys() for row in rows)
    card = (files / "whole" / "README.md").read_text()
    assert "recipe `from-context`" in card and "what documents in a prompt change" in card
    assert head.metrics["missing_answer"] in card


def test_documents_and_questions_decide_the_head(files):
    write(files / "other.jsonl", lambda i: f"{chr(110 + i % 4) * 9}")
    heads = [
        train(config(files, name, data=files / f"{name}.jsonl", eval_prompts=0)).head for name in ("asked", "other")
    ]

    assert not all(map(torch.equal, heads[0].state_dict().values(), heads[1].state_dict().values()))


class Stages(Reporter):
    """Remembers the names of stages."""

    def __init__(self):
        self.names = []

    @contextmanager
    def stage(self, name, total):
        self.names.append(name)
        yield lambda count: None


def started(settings):
    plan = make_plan(settings)
    return start(settings, plan, Identity.of(settings, plan), Reporter())


def test_what_is_learned_of_answers_is_the_difference_that_documents_make(files):
    run = started(config(files))
    (side, _), untrained = GroundingLearner.prompt_sides(run), run.new_head().eval()
    replies = generate_replies(run, "base", side.prompts, 1, 0, untrained, is_base=True)
    side = Side.of("base replies", side.prompts, replies)
    rows = {row.prompt[-1].content: row for row in run.plan.train.rows}
    assert len(side.prompts) == 16 and all(
        rows[prompt.messages[-1].content].columns["answerable"] for prompt in side.prompts
    )

    values = differences(run, [side])[0].values

    def log_probs(text, row):
        """Of all tokens, by a forward over the whole text."""
        reply = side.generated[int(side.positions.replies[row])].token_ids[: int(side.positions.places[row])]
        ids = [*run.model.tokenizer(text).input_ids, *reply]
        with torch.inference_mode():
            return run.model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    pairs = []
    for row in range(0, len(values), 3):
        prompt = side.prompts[side.generated[int(side.positions.replies[row])].prompt_index].messages[-1].content
        question = prompt.partition(" | ")[2]
        live = side.positions.live[row]
        ids, base = side.positions.token_ids[row][live], side.positions.log_probs[row][live].softmax(-1)
        one, other = (log_probs(f"[user] {text}\n[assistant] ", row)[ids] for text in (prompt, question))
        pairs.append(((one - other) - (base * (one - other)).sum(), values[row][live]))
    expected, found = (torch.cat(part) for part in zip(*pairs, strict=True))
    factor = float(expected.norm() / found.norm())  # the standard deviation that the contrast counts in
    torch.testing.assert_close(found * factor, expected, atol=2e-2, rtol=2e-2)


def test_along_the_sentence_it_is_wanted_where_there_is_no_answer_and_the_base_model_where_there_is_one(files):
    run = started(config(files, **SAYS))
    prompts = limited_prompts(run, run.plan.train)[:3]
    asked = [Asked(prompts[0], False, True), Asked(prompts[1], True, True), Asked(prompts[2], True, False)]

    found = read_sentence(run, "sentence", SAYS["missing_answer"], asked)

    ids = given_to(run, SAYS["missing_answer"], prompts)[0].text
    tokens = run.model.tokenizer(ids).input_ids
    assert run.model.tokenizer.eos_token_id == tokens[-1]
    replies, places = found.positions.replies, found.positions.places
    assert [places[replies == i].tolist() for i in range(3)] == [
        list(range(len(tokens))), list(range(1, len(tokens))), list(range(len(tokens))),
    ]  # fmt: skip
    wanted = found.log_probs[replies == 0].exp()
    assert torch.equal(wanted.argmax(-1), found.positions.taken[replies == 0])
    assert torch.equal(wanted.max(-1).values, torch.ones(len(tokens)))
    assert torch.equal(found.log_probs[replies > 0], found.positions.log_probs[replies > 0])


def test_the_gate_says_the_sentence_where_there_is_no_answer(files):
    write(files / "clear.jsonl", lambda i: "yes " * 9 + "abcd"[i % 4])
    rows = [json.loads(line) for line in (files / "clear.jsonl").read_text().splitlines()]
    rows += [{"prompt": row["prompt"], "context": f"no {i}", "answerable": False} for i, row in enumerate(rows)]
    learning = {**SAYS, "epochs": 150, "patience": 150, "inner_size": 64, "max_replies": 64, "learning_rate": 3e-3}
    settings = config(files, **{**learning, "eval_prompts": 0, "data": None})

    head = train(settings, data=rows).head
    said = {
        context: MARAEngine(str(files / "tiny"), head).generate(f"{context} | 0 a?", temperature=0.0, max_new_tokens=4)
        for context in ("yes " * 9 + "a", "no 0")
    }

    assert [text.startswith("no") for text in (str(each.text) for each in said.values())] == [False, True]


def test_questions_with_an_answer_are_needed_on_both_sides(files):
    rows = [{"prompt": f"{i}?", "context": f"{i} so", "answerable": i == 0} for i in range(40)]
    with pytest.raises(DataError, match=r"answerable is false for all \d+ questions (held out|to fit on)"):
        make_plan(config(files, data=None), Inputs(data=rows))


def test_a_sentence_that_the_model_can_not_say_is_refused_by_its_token(files):
    with pytest.raises(
        ConfigError, match=r"missing_answer='zebra' can't be said: after '\w*', '\w+' is not among the 3"
    ):
        train(config(files, missing_answer="zebra", top_k=3))


def test_a_sentence_that_is_longer_than_a_reply_is_refused(files):
    with pytest.raises(ConfigError, match=r"has 9 tokens, but max_reply_tokens=6"):
        train(config(files, missing_answer="I'm lost"))


def test_of_the_shipped_sentences_the_first_that_can_be_said_is_taken(files, monkeypatch):
    def shares(run, stage, sentence, prompts):
        cut = {"one": 12, "two": 1, "three": 0}[sentence]
        return [None] * 16, GivenPositions(None, torch.tensor([[i, 0] for i in range(cut)]).reshape(-1, 2), 0)

    monkeypatch.setattr(missing_answers, "_read", shares)
    monkeypatch.setattr(missing_answers, "SENTENCES", ("one", "two", "three"))
    run = started(config(files))

    assert missing_answers.choose_sentence(run, limited_prompts(run, run.plan.train)) == "two"


def test_the_judges_of_documents_need_no_naming_and_know_the_sentence(files):
    judges = make_plan(config(files, missing_answer="Das weiss ich nicht.")).judges

    assert judges["admitted"](["Hm. das weiss ich nicht!"], answerable=[False]) == [0.0]
    assert judges["admitted"](["Hm. das weiss ich nicht."], answerable=[False]) == [1.0]
    assert judges["answered"](["Rot. Das weiss ich nicht."], answerable=[True], answer=["rot"]) == [0.0]
    named = make_plan(config(files, judge="length", missing_answer="Das weiss ich nicht.")).judges
    assert named.keys() == {"length"}


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
        ({"missing_answer": "  "}, "it says nothing"),
        ({"principle": "Be kind."}, "method 'principle' takes prompts as they are"),
        ({"method": "grounding", "reward": "length"}, "learns from the documents, not from length"),
        ({"method": "grounding", "principle": "Be kind."}, "method 'grounding' needs questions with documents"),
        (
            {"reward": "length", "context_template": None, "missing_answer": "I do not know."},
            "missing_answer='I do not know.' is not allowed: method 'rloo' takes prompts as they are",
        ),
        ({"form": "residual"}, "form='residual' is not allowed"),
    ],
)
def test_what_can_not_work_is_refused_before_the_model_is_loaded(files, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(files, **settings))
