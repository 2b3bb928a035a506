"""Rewards by name, reward models, several rewards as one, and rewards that fail while they work."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from mara_integrations.errors import ConfigError, MaraError, MissingExtraError, RewardError
from mara_integrations.messages import Message, ToolCall
from mara_integrations.rewards import (
    CombinedReward,
    ForbiddenWords,
    FunctionReward,
    ModelReward,
    load_rewards,
    parse_reward,
    reward_from_spec,
    reward_name,
    reward_spec,
    score,
    takes_partial_text,
)
from mara_integrations.testing import tiny_tokenizer

PROMPTS = [(Message("user", "Hi"),), (Message("user", "Bye"),)]
REPLIES = ["Hello there!", "See you."]


def says(text: str, replies: list[str]) -> list[float | None]:
    reward, _ = parse_reward(text)
    return score(reward, [PROMPTS[0]] * len(replies), replies)


class TestByName:
    def test_length_is_best_at_the_number_of_words(self) -> None:
        assert says("length?words=4", ["a b c d", "a b", "", "a b c d e f g h"]) == [0.0, -0.5, -1.0, -1.0]

    def test_a_pattern_is_found_anywhere_and_may_hold_what_addresses_escape(self) -> None:
        assert says("regex?pattern=^Dear\\b", ["Dear Ann", "Oh Dear"]) == [1.0, 0.0]
        assert says("regex?pattern=a%26b%3D", ["a&b=", "a"]) == [1.0, 0.0]

    def test_forbidden_words_are_a_rule(self) -> None:
        reward, _ = parse_reward("forbidden-words?words=you,your")
        assert isinstance(reward, ForbiddenWords)
        assert says("forbidden-words?words=you,your", ["You!", "All fine"]) == [0.0, 1.0]

    def test_json_is_one_value_and_nothing_else(self) -> None:
        assert says("json", ['{"a": 1}', " [1, 2]\n", '{"a": 1', 'Sure: {"a": 1}', ""]) == [1.0, 1.0, 0.0, 0.0, 0.0]

    def test_sentiment_tells_praise_from_scorn(self) -> None:
        pytest.importorskip("vaderSentiment", reason="needs the quality extra")
        good, bad = says("sentiment", ["I love this, wonderful!", "I hate this, awful."])
        assert good is not None and bad is not None and good > 0.5 > -0.5 > bad

    def test_toxicity_is_asked_for_a_batch_and_counts_against_a_reply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        class Detoxify:
            def __init__(self, model: str) -> None:
                asked.append(model)

            def predict(self, texts: list[str]) -> dict[str, list[float]]:
                asked.append(texts)
                return {"toxicity": [0.9, 0.1], "obscene": [1.0, 1.0]}

        module = ModuleType("detoxify")
        module.Detoxify = Detoxify  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "detoxify", module)
        assert says("toxicity?model=unbiased", REPLIES) == [-0.9, -0.1]
        assert asked == ["unbiased", REPLIES]

    @pytest.mark.parametrize(
        ("name", "module", "extra"), [("sentiment", "vaderSentiment", "quality"), ("toxicity", "detoxify", "toxicity")]
    )
    def test_what_is_not_installed_is_named_with_its_extra(
        self, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, f"{module}.{module}", raising=False)
        with pytest.raises(MissingExtraError, match=f"reward '{name}' needs {module}") as caught:
            parse_reward(name)
        assert caught.value.hint == f"pip install 'mara-integrations[{extra}]'"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("lenght", "reward 'lenght' is unknown"),
            ("length?words=many", "length?words=many is not allowed"),
            ("length?chars=3", "reward 'length' takes words; given is chars"),
            ("regex", "reward 'regex' takes pattern; given is nothing"),
            ("regex?pattern=(", "is not a regular expression"),
            ("json=much", "weight 'much' is not a number"),
            ("json=0", "reward 'json' has weight 0"),
            ("hf:org/model?labels=x", "'labels' is not an argument"),
            ("hf:org/model?text=prompt", "text=prompt is not allowed"),
            ("rewards.py:f?words=3", "a function of yours takes no arguments here"),
        ],
    )
    def test_what_is_wrong_is_said(self, text: str, said: str) -> None:
        with pytest.raises(MaraError) as caught:
            load_rewards([text])
        assert said in caught.value.message

    @pytest.mark.parametrize(
        ("text", "said", "hint"),
        [
            ("sentimnt", "reward 'sentimnt' is unknown", "did you mean sentiment?"),
            ("mine", "reward 'mine' is unknown", "a function of yours is file.py:function or module:function"),
            ("rewards.py", "reward 'rewards.py' is not of the form module:function", "for example rewards.py:brand"),
        ],
    )
    def test_a_reward_that_is_not_there_comes_with_what_was_meant(self, text: str, said: str, hint: str) -> None:
        with pytest.raises(RewardError) as caught:
            load_rewards([text])
        assert caught.value.message == said and hint in (caught.value.hint or "")

    def test_only_what_can_judge_half_a_reply_says_so(self) -> None:
        def mine(completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

        assert not takes_partial_text(mine) and not takes_partial_text(FunctionReward("x:mine", mine))
        mine.takes_partial_text = True  # type: ignore[attr-defined]
        assert takes_partial_text(FunctionReward("x:mine", mine))
        assert [takes_partial_text(parse_reward(name)[0]) for name in ("length", "json", "hf:x/y")] == [
            *(True, False, False)
        ]


class TestReference:
    @pytest.mark.parametrize(
        "text", ["length?words=7", "regex?pattern=a|b", "json", "forbidden-words?words=x", "hf:org/model?label=good"]
    )
    def test_a_reward_survives_json(self, text: str) -> None:
        spec = reward_spec(parse_reward(text)[0])
        assert reward_spec(reward_from_spec(json.loads(json.dumps(spec)))) == spec

    def test_so_does_a_sum(self) -> None:
        spec = reward_spec(load_rewards(["length", "json=-2"], normalise=True))
        again = reward_from_spec(json.loads(json.dumps(spec)))
        assert reward_spec(again) == spec and reward_name(again) == "length + -2 × json"


class TestSeveral:
    def test_weights_multiply_and_parts_add(self) -> None:
        reward = load_rewards(["regex?pattern=e=1", "regex?pattern=Hello&weight=10"])
        found: dict[str, Any] = {}
        assert score(reward, PROMPTS, REPLIES, on_parts=found.update) == [10.0, 0.0]
        assert found == {"regex": [0.0, 0.0], "regex (2)": [1.0, 0.0]}

    def test_one_of_weight_1_stays_itself(self) -> None:
        assert not isinstance(load_rewards(["json"]), CombinedReward)
        assert isinstance(load_rewards(["json=2"]), CombinedReward)

    def test_those_without_an_opinion_do_not_count(self) -> None:
        def some(completions: list[str]) -> list[float | None]:
            return [None, None, 1.0]

        def others(completions: list[str]) -> list[float | None]:
            return [None, 2.0, 3.0]

        reward = CombinedReward([(some, 1.0), (others, 0.5)])
        assert score(reward, [PROMPTS[0]] * 3, ["a", "b", "c"]) == [None, 1.0, 2.5]

    def test_each_gets_the_arguments_that_it_names(self) -> None:
        async def by_topic(completions: list[str], topic: list[str]) -> list[float]:
            return [float(word in text) for word, text in zip(topic, completions, strict=True)]

        def by_prompt(prompts: list[str], completions: list[str]) -> list[float]:
            return [float(len(prompt)) for prompt in prompts]

        reward = CombinedReward([(by_topic, 1.0), (by_prompt, 1.0)])
        assert score(reward, PROMPTS, REPLIES, columns={"topic": ["Hello", "Hello"]}) == [3.0, 3.0]

    def test_normalised_parts_weigh_alike_whatever_their_scale_and_keep_the_first_batchs(self) -> None:
        def small(completions: list[str]) -> list[float]:
            return [len(text) / 1000 for text in completions]

        def large(completions: list[str]) -> list[float]:
            return [-1000.0 * len(text) for text in completions]

        reward = CombinedReward([(small, 1.0), (large, 1.0)], normalise=True)
        texts = ["x" * n for n in range(1, 11)]
        first = score(reward, [PROMPTS[0]] * 10, texts)
        assert first == pytest.approx([0.0] * 10)
        parts: dict[str, Any] = {}
        single = CombinedReward([(small, 1.0)], normalise=True)
        batch = score(single, [PROMPTS[0]] * 10, texts, on_parts=parts.update)
        assert sum(value or 0.0 for value in batch) == pytest.approx(0.0)
        assert score(single, [PROMPTS[0]], [texts[0]]) == [batch[0]]
        assert parts["small"][0] == 0.001  # curves show the reward's own scale

    def test_it_judges_half_replies_where_all_parts_do(self) -> None:
        assert takes_partial_text(load_rewards(["length", "regex?pattern=a"]))
        assert not takes_partial_text(load_rewards(["length", "json"]))

    def test_an_empty_sum_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no reward to combine"):
            CombinedReward([])


class TestFailures:
    def test_what_a_failing_reward_was_asked_is_kept_in_a_file(self, tmp_path: Path) -> None:
        def broken(completions: list[str], topic: list[str]) -> list[float]:
            raise KeyError("tone")

        file = tmp_path / "run" / "reward-failure.json"
        with pytest.raises(RewardError, match="raised KeyError") as caught:
            score(broken, PROMPTS, REPLIES, columns={"topic": ["a", "b"]}, failure_file=file)
        assert f"its inputs are in {file}; it happened at" in (caught.value.hint or "")
        kept = json.loads(file.read_text())
        assert kept == {"topic": ["a", "b"], "prompts": ["Hi", "Bye"], "completions": REPLIES}

    def test_so_is_what_one_was_asked_that_returns_no_number(self, tmp_path: Path) -> None:
        file = tmp_path / "failure.json"
        with pytest.raises(RewardError, match="returned nan at index 0"):
            score(lambda completions: [float("nan"), 0.0], PROMPTS, REPLIES, failure_file=file)
        assert json.loads(file.read_text())["completions"] == REPLIES

    def test_one_that_hangs_is_given_up(self, tmp_path: Path) -> None:
        def slow(completions: list[str]) -> list[float]:
            time.sleep(5)
            return [0.0, 0.0]

        began = time.monotonic()
        with pytest.raises(RewardError, match=r"'slow' did not answer within 0\.1 s \(batch of 2\)"):
            score(slow, PROMPTS, REPLIES, timeout_s=0.1)
        assert time.monotonic() - began < 2

    def test_one_that_is_in_time_says_and_raises_what_it_would(self) -> None:
        async def quick(completions: list[str]) -> list[float]:
            return [1.0, 2.0]

        def leaves(completions: list[str]) -> list[float]:
            raise ValueError("no")

        assert score(quick, PROMPTS, REPLIES, timeout_s=30) == [1.0, 2.0]
        with pytest.raises(RewardError, match="raised ValueError: no"):
            score(leaves, PROMPTS, REPLIES, timeout_s=30)

    def test_calls_in_a_prompt_are_shown_to_the_reward(self) -> None:
        def calls(prompts: list[Any], completions: list[Any]) -> list[float]:
            return [float(prompts[0][1]["tool_calls"][0]["function"]["arguments"]["n"])]

        called = Message("assistant", "", (ToolCall("1", "f", {"n": 3}),))
        prompt = (*PROMPTS[0], called, Message("tool", "x", tool_call_id="1"))
        assert score(calls, [prompt], ["ok"], conversational=True) == [3.0]


def classifier(folder: Path, *, template: bool = True, **config: Any) -> PreTrainedModel:
    """A tiny random classifier with its tokenizer in a folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = AutoConfig.for_model(
        "llama", vocab_size=256, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **sizes, **config
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(settings)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return model.eval()


class TestRewardModels:
    def by_hand(self, model: PreTrainedModel, *texts: str) -> torch.Tensor:
        """Logits of each text alone, without batching or padding."""
        tokenizer = tiny_tokenizer()
        with torch.inference_mode():
            return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])

    def test_the_logit_of_the_conversation_in_the_classifiers_own_template(self, tmp_path: Path) -> None:
        model = classifier(tmp_path, num_labels=1)
        expected = self.by_hand(model, "[user] Hi\n[assistant] Hello there!\n", "[user] Bye\n[assistant] See you.\n")
        reward, _ = parse_reward(f"hf:{tmp_path}?batch=2")
        assert score(reward, PROMPTS, REPLIES) == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
        assert score(reward, PROMPTS, REPLIES, conversational=True) == score(reward, PROMPTS, REPLIES)

    @pytest.mark.parametrize("label", ["good", "GOOD", "1"])
    def test_the_probability_of_the_label_that_was_chosen(self, tmp_path: Path, label: str) -> None:
        names = {0: "bad", 1: "good", 2: "unsure"}
        model = classifier(tmp_path, id2label=names, label2id={name: i for i, name in names.items()})
        reward = ModelReward(str(tmp_path), label=label, text="reply")
        expected = self.by_hand(model, *REPLIES).softmax(-1)[:, 1]
        assert score(reward, PROMPTS, REPLIES) == pytest.approx(expected.tolist(), abs=1e-5)

    def test_of_several_labels_a_text_each_has_its_own_probability(self, tmp_path: Path) -> None:
        model = classifier(tmp_path, num_labels=2, problem_type="multi_label_classification")
        expected = self.by_hand(model, *REPLIES).sigmoid()[:, 0]
        reward = ModelReward(str(tmp_path), label="LABEL_0", text="reply")
        assert score(reward, PROMPTS, REPLIES) == pytest.approx(expected.tolist(), abs=1e-5)

    def test_without_a_template_prompt_and_reply_are_a_pair(self, tmp_path: Path) -> None:
        model = classifier(tmp_path, num_labels=1, template=False)
        with torch.inference_mode():
            expected = float(model(**tiny_tokenizer()("Hi", "Hello there!", return_tensors="pt")).logits)
        assert score(ModelReward(str(tmp_path)), PROMPTS[:1], REPLIES[:1]) == pytest.approx([expected], abs=1e-5)

    def test_a_text_past_the_classifiers_window_keeps_its_end(self, tmp_path: Path) -> None:
        model = classifier(tmp_path, num_labels=1)
        long = "x" * 100 + " the end"
        reward = ModelReward(str(tmp_path), text="reply")
        assert score(reward, PROMPTS[:1], [long]) == pytest.approx(
            self.by_hand(model, long[-64:])[0].tolist(), abs=1e-5
        )

    def test_several_outputs_need_a_choice(self, tmp_path: Path) -> None:
        classifier(tmp_path, num_labels=2)
        for arguments, said in (({}, "none was chosen"), ({"label": "best"}, "none is called 'best'")):
            with pytest.raises(RewardError, match=f"has 2 outputs, and {said}") as caught:
                score(ModelReward(str(tmp_path), **arguments), PROMPTS, REPLIES)
            assert "LABEL_0, LABEL_1" in str(caught.value)

    def test_what_is_no_classifier_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RewardError, match=r"^reward model .* can't be loaded"):
            score(ModelReward(str(tmp_path / "absent")), PROMPTS, REPLIES)
