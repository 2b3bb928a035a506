"""An LLM judge in a training: what it is asked, what that may cost, where it stops, and what people say."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from mara_integrations.errors import CallBudgetError, ConfigError, RewardError
from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import Reporter
from mara_integrations.rewards import llm_judge
from mara_integrations.rewards.judges.session import judges_folder
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.identity import Identity
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import start, train
from mara_integrations.training.scoring.llm_judges import expected_calls

SMALL = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 4, "max_replies": 16, "rounds": 0}
_LOCK = threading.Lock()


class CountsVowels(BaseChatModel):
    """Judges by the number of vowels."""

    asked: list[str]

    @property
    def _llm_type(self) -> str:
        return "vowels"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        shown = str(messages[-1].content)
        with _LOCK:
            self.asked.append(shown)
        found = [
            sum(letter in "aeiou" for letter in reply)
            for reply in re.findall(r"<reply(?:_[AB])?>\n(.*?)\n</reply", shown, re.DOTALL)
        ]
        said = f"Score: {min(10, found[0])}"
        if len(found) == 2:
            said = f"Winner: {'A' if found[0] > found[1] else 'B' if found[1] > found[0] else 'tie'}"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])


@pytest.fixture
def config(folder_model: str, prompts_file: Path, tmp_path: Path) -> Any:
    def config(**how: Any) -> TrainConfig:
        given = {"model": folder_model, "data": prompts_file, "output": tmp_path / "head", **SMALL, **how}
        return TrainConfig.of(**given)

    return config


@pytest.mark.parametrize("mode", ["score", "pairs"])
def test_a_head_is_trained_on_judgements(config: Any, tmp_path: Path, mode: Any) -> None:
    model = CountsVowels(asked=[])
    result = train(config(), reward=llm_judge(model, mode=mode))
    assert result.evaluation is not None and next(iter(result.evaluation.rewards)).startswith("judge CountsVowels")
    assert MARAHead.from_pretrained(tmp_path / "head").config.rewards[0]["kind"] == "llm"
    assert len(model.asked) == len(set(model.asked)), "nothing is asked twice"


def test_it_stops_at_the_budget_and_the_same_command_goes_on_to_the_same_head(config: Any, tmp_path: Path) -> None:
    pieces, starts = CountsVowels(asked=[]), 0
    while True:
        starts += 1
        try:
            result = train(config(max_judge_calls=15), reward=llm_judge(pieces))
            break
        except CallBudgetError as error:
            assert "max_judge_calls=15" in error.message
            assert len(pieces.asked) == 15 * starts
            assert not (tmp_path / "head" / "reward-failure.json").exists()
    shutil.rmtree(judges_folder())
    whole = CountsVowels(asked=[])
    expected = train(config(output=tmp_path / "whole"), reward=llm_judge(whole)).head.fingerprint
    assert starts > 2 and result.head.fingerprint == expected
    assert len(pieces.asked) == len(whole.asked), "no judgement is paid twice"


@pytest.fixture
def local_judge(tmp_path: Path) -> str:
    tiny_model(max_position_embeddings=4096).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    return f"llm:mara:{tmp_path / 'judge'}"


def test_a_dry_run_says_how_often_it_will_ask_and_keeps_nothing(
    config: Any, local_judge: str, tmp_path: Path, notes: Any
) -> None:
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    settings = config(judge=f"{local_judge}?structured=yes", reward="length?words=3")
    dry_run(settings, notes)
    said = next(line for line in notes.lines if "Judges" in line)
    assert re.search(r"up to \d+ of judge mara:", said) and "stops a run at 5000" in said
    assert not judges_folder().exists() and not (tmp_path / "head").exists()


@pytest.mark.parametrize("mode", ["score", "pairs"])
def test_the_estimate_is_a_bound(config: Any, mode: Any) -> None:
    model, settings = CountsVowels(asked=[]), config(rounds=1)
    judge = llm_judge(model, mode=mode)
    plan = make_plan(settings, Inputs(rewards=[(judge, 1.0)]))
    run = start(settings, plan, Identity.of(settings, plan), Reporter())
    (bound,) = expected_calls(run).values()
    run.workers.close()
    train(settings, reward=judge)
    assert 0 < len(model.asked) <= bound + 2 * judge.calls_per_reply + 2, "which try the judge"


def test_agreement_with_people_is_reported_where_the_data_has_pairs(
    config: Any, prompts_file: Path, notes: Any
) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": "aeiou", "rejected": "xyz" if i % 3 else "aaaaaaa"} for i in range(30)]
    prompts_file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    result = train(config(), reward=llm_judge(CountsVowels(asked=[])), reporter=notes)
    assert any("agrees with 67% of 30 pairs of the data [" in line for line in notes.lines)
    agreement = result.head.config.metrics["judge_agreement"]["judge CountsVowels"]
    assert agreement["pairs"] == 30 and agreement["mean"] == pytest.approx(2 / 3)


def test_a_judge_may_only_report(config: Any) -> None:
    model = CountsVowels(asked=[])
    result = train(config(reward="length?words=2"), judge=llm_judge(model, mode="pairs"))
    assert result.evaluation is not None and "judge CountsVowels (pairs)" in result.evaluation.rewards and model.asked


@pytest.mark.parametrize("setting", [{"partial_text": True}, {"method": "sac", "credit": "prefix"}])
def test_unfinished_replies_are_not_shown_to_a_judge(config: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="judges whole replies, and would be called some hundred times a reply"):
        train(config(**setting), reward=llm_judge(CountsVowels(asked=[])))


def test_a_judge_of_no_use_is_found_out_before_the_work(config: Any, local_judge: str, tmp_path: Path) -> None:
    settings = config(judge=f"{local_judge}?max_tokens=3", reward="length?words=3")
    with pytest.raises(RewardError, match=r"judged none of 2 replies; the first: no judgement in"):
        train(settings)
    assert not (tmp_path / "head" / "head_config.json").exists()
