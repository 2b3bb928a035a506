"""Earlier work in the output folder: what is continued, what is not and why, and what is never overwritten."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mara_integrations.errors import ModelError, OutputError
from mara_integrations.heads.head import MARAHead
from mara_integrations.testing import tiny_model
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import FAILURE_FILE
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.run import train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 0, "max_replies": 16, "rounds": 0}
REWARD = "def vowels(completions, **_):\n    return [sum(map(text.count, 'aeiou')) for text in completions]\n"


def continued(notes):
    return [line for line in notes.lines if "an interrupted run in this folder is continued" in line]


def not_continued(notes):
    return [line for line in notes.lines if "is not continued" in line]


@pytest.fixture
def settings(folder_model, prompts_file, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)

    def settings(**values):
        named = {"model": folder_model, "data": prompts_file, "reward": f"{tmp_path / 'rewards.py'}:vowels"}
        return TrainConfig.of(**{**named, "output": tmp_path / "head", **SMALL, **values})

    return settings


@pytest.fixture
def interrupted(settings, interrupting):
    """An interrupted run in the folder `head`."""
    with pytest.raises(KeyboardInterrupt):
        train(settings(), reporter=interrupting("held-out base replies", 1))
    return settings


class TestAnInterruptedRun:
    def test_is_continued_by_the_same_command_and_that_is_said(self, interrupted, notes):
        train(interrupted(), reporter=notes)
        assert not not_continued(notes) and len(continued(notes)) == 1

    def change_reward(self, tmp_path):
        (tmp_path / "rewards.py").write_text(REWARD.replace("aeiou", "xyz"))

    def change_helper(self, tmp_path):
        (tmp_path / "letters.py").write_text("VOWELS = 'xyz'\n")

    def change_data(self, tmp_path):
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "one more?"}) + "\n")

    @pytest.mark.parametrize(
        ("change", "said"), [("change_reward", "the reward changed"), ("change_data", "the data changed")]
    )
    def test_of_another_reward_or_other_data_is_not_and_that_is_said_before_the_model_is_loaded(
        self, interrupted, tmp_path, monkeypatch, change, said, notes
    ):
        getattr(self, change)(tmp_path)

        def load(spec):
            assert said in not_continued(notes)[0]
            raise InterruptedError

        monkeypatch.setattr("mara_integrations.training.run.load_model", load)
        with pytest.raises(InterruptedError):
            train(interrupted(), reporter=notes)

    def test_of_other_settings_is_not_and_they_are_named(self, interrupted, notes):
        train(interrupted(seed=3), reporter=notes)
        assert "seed was 0, is 3" in not_continued(notes)[0]
        assert len(not_continued(notes)) == 1 and not continued(notes)

    def test_of_another_version_is_not(self, interrupted, monkeypatch, notes):
        monkeypatch.setattr("mara_integrations.__version__", "99.0")
        dry_run(interrupted(), notes)
        assert "the version of mara_integrations was" in not_continued(notes)[0]
        assert "is 99.0" in not_continued(notes)[0]

    def test_of_other_weights_under_the_same_name_is_not(self, interrupted, folder_model, notes):
        tiny_model(seed=1).save_pretrained(folder_model)
        train(interrupted(), reporter=notes)
        assert "the weights of the model changed" in not_continued(notes)[0]

    def test_whose_reward_uses_another_file_beside_it_is_not_when_that_changed(
        self, settings, interrupting, tmp_path, notes
    ):
        self.change_helper(tmp_path)
        (tmp_path / "uses.py").write_text("import letters\n" + REWARD.replace("'aeiou'", "letters.VOWELS"))
        config = settings(reward=f"{tmp_path / 'uses.py'}:vowels")
        with pytest.raises(KeyboardInterrupt):
            train(config, reporter=interrupting("held-out base replies", 1))
        (tmp_path / "letters.py").write_text("VOWELS = 'aeiou'\n")
        dry_run(config, notes)
        assert "the reward changed" in not_continued(notes)[0]


class TestAFinishedHead:
    def test_is_returned_by_the_same_command_at_once(self, settings, monkeypatch, notes):
        first = train(settings(), reporter=notes)
        assert not continued(notes), "there was nothing before"
        monkeypatch.setattr("mara_integrations.training.run.load_model", lambda spec: pytest.fail("nothing to do"))
        notes.lines.clear()

        again = train(settings(), reporter=notes)

        assert again.was_finished and not first.was_finished
        assert again.head.fingerprint == first.head.fingerprint
        assert again.kl_per_token == pytest.approx(first.kl_per_token)
        assert any("finished already" in line for line in notes.lines)

    def test_is_not_overwritten_by_another_command_unless_that_is_said(self, settings):
        first = train(settings())
        with pytest.raises(OutputError, match=r"finished head of another run: seed was 0, is 1") as caught:
            train(settings(seed=1))
        assert "--overwrite" in caught.value.hint
        assert MARAHead.from_pretrained(first.output).fingerprint == first.head.fingerprint

        second = train(settings(seed=1, overwrite=True))

        assert second.head.fingerprint != first.head.fingerprint
        assert MARAHead.from_pretrained(first.output).fingerprint == second.head.fingerprint

    def test_of_other_data_is_told_by_the_data(self, settings, tmp_path):
        train(settings())
        TestAnInterruptedRun().change_data(tmp_path)
        with pytest.raises(OutputError, match="the data changed"):
            train(settings())

    def test_that_something_else_made_is_not_overwritten(self, settings, tmp_path):
        from mara_integrations.testing import random_head

        random_head(32).save_pretrained(tmp_path / "head")
        with pytest.raises(OutputError, match="holds a head that something else made"):
            train(settings())

    def test_that_is_damaged_is_not_overwritten(self, settings, tmp_path):
        train(settings())
        (tmp_path / "head" / "head.safetensors").write_bytes(b"damaged")
        with pytest.raises(OutputError, match="holds a head that can't be read"):
            train(settings())

    def test_that_was_interrupted_in_its_evaluation_is_finished(self, settings, interrupting, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            train(settings(eval_prompts=3), reporter=interrupting("evaluation on held-out prompts", 1))
        assert (tmp_path / "head" / "head_config.json").exists()
        result = train(settings(eval_prompts=3))
        assert not result.was_finished and result.evaluation is not None

    def test_leaves_no_failure_of_a_reward_behind(self, settings, tmp_path):
        (tmp_path / "rewards.py").write_text("def vowels(completions, **_):\n    raise ValueError('no')\n")
        with pytest.raises(Exception, match="no"):
            train(settings())
        assert (tmp_path / "head" / FAILURE_FILE).exists()
        (tmp_path / "rewards.py").write_text(REWARD)
        train(settings())
        assert not (tmp_path / "head" / FAILURE_FILE).exists()


_HOLD = """
import sys, time
from pathlib import Path
from mara_integrations.training.records.output_lock import locked

with locked(Path(sys.argv[1]), Path(sys.argv[1]) / ".run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_run_writes_into_is_refused_in_one_line(settings, tmp_path):
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "head")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(OutputError, match=r"another run is writing into '.*head'"):
                train(settings())
        finally:
            other.kill()
    assert train(settings()).head is not None, "a run that was killed holds no lock"


def test_a_run_that_is_refused_leaves_no_folder(settings, tmp_path):
    with pytest.raises(ModelError):
        train(settings(model=str(tmp_path / "absent")))
    assert not (tmp_path / "head").exists()


def test_a_head_tells_where_it_comes_from(settings, prompts_file):
    config = train(settings(system_prompt="Be brief.\nAlways.", seed=5)).head.config
    assert config.system_prompt == "Be brief.\nAlways."
    came_from = config.origin
    assert (came_from.data, came_from.num_rows + came_from.num_held_out_rows) == (prompts_file.name, 20)
    assert came_from.command.startswith("mara-tools train --model tiny --data prompts.jsonl --output head")
    assert "--reward rewards.py:vowels" in came_from.command and "--seed 5" in came_from.command
    assert str(prompts_file.parent) not in came_from.command, "folders of this machine are nobody's business"
    assert {"mara_integrations", "torch", "transformers", "Python"} == set(came_from.versions)
    card = (settings().output / "README.md").read_text()
    assert all(part in card for part in ("> Always.", "prompts.jsonl", "--seed 5", came_from.date))
