"""`mara-tools train` on a tiny model: data, settings, dry runs, resuming, pushing, and how it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import pytest
import torch
from commands import QUICK, VOWELS, refused, run, write_rows
from huggingface_hub.errors import RepositoryNotFoundError

from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import Reporter
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.config import GROUPS, TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.run import start

pytestmark = pytest.mark.usefixtures("in_the_folder")


def test_train_takes_every_setting_and_says_what_each_is_for(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = run("train", "--help").stdout
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(TrainConfig.model_fields)
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in said
        assert field.description, name
    places = [said.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)


def test_no_name_of_an_option_is_cut_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = run("train", "--help").stdout.split()
    assert {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields} <= set(words)
    assert not [word for word in words if word.startswith("-") and word.endswith("…")]


def test_training_on_a_reward_leaves_a_head_and_says_what_to_try(rewarded, folder):
    said = rewarded.stdout
    assert said.startswith("Training a head for model on prompts.jsonl, into rewarded\n")
    assert "model · rewarded" in [line.strip() for line in said.splitlines()], "the title of the table"
    assert "tokens/s (noisy)" in said
    for line in (
        "mara-tools chat --model model --head rewarded --system-prompt 'be kind'\n",
        "--data prompts.jsonl --report report.html\n",
        "llm = MARALLM(model='model', head='rewarded', system_prompt='be kind')\n",
    ):
        assert line in said
    assert MARAHead.from_pretrained(folder / "rewarded").config.method == "rloo"
    assert sorted(path.name for path in (folder / "rewarded").iterdir()) == [
        *("README.md", "head.safetensors", "head_config.json", "metrics.jsonl", "train.yaml")
    ]


def test_training_on_pairs_without_evaluation(folder):
    run("train", "--model", "model", "--data", "pairs.jsonl", "--output", "on-pairs", "--eval-prompts", 0, *QUICK)
    assert MARAHead.from_pretrained("on-pairs").config.form == "q"


def test_a_head_of_pairs_is_evaluated_on_those_of_the_applications_prompts_that_were_held_out(folder):
    data = ("--data", "pairs.jsonl", "--prompts", "prompts.jsonl", "--eval-prompts", 2)
    said = run("train", "--model", "model", "--output", "on-both", *data, *QUICK).stdout
    assert "--data prompts.jsonl --report report.html\n" in said
    evaluate = ("eval", "--model", "model", "--head", "on-both", "--max-new-tokens", 2)
    assert "only those held out then" in run(*evaluate, "--data", "prompts.jsonl").stdout
    assert "only those held out then" in run(*evaluate, "--data", "pairs.jsonl").stdout


def test_data_of_other_names_is_understood_and_shown_before_training(folder):
    schema = {"name": "clock", "parameters": {"type": "object"}}
    rows = [{"ask": f"say {i}", "chosen": "aeiou", "rejected": "xyz", "tools": [schema]} for i in range(12)]
    write_rows(folder / "other.jsonl", [*rows, {"ask": "say 12", "chosen": "", "rejected": "xyz"}])
    data = ("--data", "other.jsonl", "--column", "prompt=ask", "--skip-bad-rows")
    said = run("train", "--model", "model", "--output", "on-other", *data, "--eval-prompts", 2, *QUICK).stdout
    assert "1 of 13 rows are left out: other.jsonl:13: 'chosen' is empty" in said
    assert "preference pairs, standard, 10 with tools; the first ones, as the model sees them:\n" in said
    assert '  | {"type": "function", "function": {"name": "clock"' in said
    assert "\n  |   chosen: aeiou\n" in said
    assert "--data other.jsonl --column prompt=ask --skip-bad-rows --report report.html\n" in said
    evaluated = run("eval", "--model", "model", "--head", "on-other", *data, "--max-new-tokens", 2).stdout
    assert "only those held out then" in evaluated


def test_several_rewards_are_weighed_and_have_a_curve_each(folder):
    rewards = ("--reward", VOWELS, "--reward", "length?words=3&weight=0.5", "--normalise-rewards")
    data = ("--data", "prompts.jsonl", "--eval-prompts", 2)
    run("train", "--model", "model", "--output", "on-several", *data, *rewards, *QUICK)
    events = [json.loads(line) for line in (folder / "on-several" / "metrics.jsonl").read_text().splitlines()]
    curves = [event for event in events if event["event"] == "reward parts"]
    assert curves and all({"vowels", "length"} <= event.keys() for event in curves)
    assert list(events[-1]["evaluation"]["rewards"]) == ["vowels + 0.5 × length", "vowels", "length"]
    again = run(
        "eval",
        "--model",
        "model",
        "--head",
        "on-several",
        "--data",
        "pairs.jsonl",
        "--max-new-tokens",
        2,
        "--trust-head-code",
    )
    assert "vowels + 0.5 × length (recorded with the head)" in again.stdout


def test_a_resumed_run_judges_by_the_scales_it_began_with(folder):
    settings = {"model": "model", "data": "prompts.jsonl", "output": folder / "scaled", "max_reply_tokens": 8}
    config = TrainConfig.of(**settings, reward=[VOWELS, "length?words=3"], normalise_rewards=True)

    def scored(count):
        plan = make_plan(config)
        run = start(config, plan, Identity.of(config, plan), Reporter())
        prompts = distinct_prompts(run, run.plan.train)
        replies = [Reply(i, "ae" * (i + 1), (1,), torch.zeros(2, 32)) for i in range(count)]
        return score_replies(run, run.plan.train, prompts, replies)

    assert scored(1) == [1 - 2 / 3]  # too few to take a scale from
    first = scored(9)
    assert sum(first) == pytest.approx(0.0, abs=1e-6)
    assert scored(1) == first[:1]


def test_a_reward_that_fails_in_training_leaves_what_it_was_asked(folder):
    (folder / "failing.py").write_text("def judge(completions, **_):\n    return [float('nan')] * len(completions)\n")
    data = ("--data", "prompts.jsonl", "--reward", "failing.py:judge")
    said = run("train", "--model", "model", "--output", "failed", *data, *QUICK, code=1)
    assert "returned nan at index 0" in said.stderr and "its inputs are in failed/reward-failure.json" in said.stderr
    assert len(json.loads((folder / "failed" / "reward-failure.json").read_text())["completions"]) == 2


def test_training_on_forbidden_words_takes_each_of_them(folder):
    words = [argument for word in "aeioun" for argument in ("--forbid", word)]
    said = run("train", "--model", "model", "--data", "prompts.jsonl", "--output", "forbidding", *words, *QUICK).stdout
    head = MARAHead.from_pretrained("forbidding")
    assert (head.config.method, head.config.rewards[0]["words"]) == ("rule", list("aeioun"))
    assert "complies" in said


def test_a_file_of_settings_equals_flags_and_flags_win(folder):
    (folder / "run.yaml").write_text(
        "model: model\ndata: pairs.jsonl\noutput: from-file\neval_prompts: 0\nmax-reply-tokens: 8\n"
        "epochs: 2\ninner_size: 24\nskip_bad_rows: true\n"
    )
    run("train", "--config", "run.yaml", "--inner-size", 16)
    flags = ("--model", "model", "--data", "pairs.jsonl", "--output", "from-flags", "--eval-prompts", 0)
    run("train", *flags, "--skip-bad-rows", "--max-reply-tokens", 8, "--epochs", 2, "--inner-size", 16)
    by_file, by_flags = (MARAHead.from_pretrained(name) for name in ("from-file", "from-flags"))
    assert by_file.fingerprint == by_flags.fingerprint and by_file.config.training == by_flags.config.training
    run("train", "--config", "from-file/train.yaml", "--output", "again-from-file")
    assert MARAHead.from_pretrained("again-from-file").fingerprint == by_file.fingerprint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_replys: 8\n", "'max_replys' is not a setting\nhint: did you mean max_replies or max_reply_tokens?"),
        ("- data\n", "holds no settings"),
        (
            "data: [\n",
            "'bad.yaml' is broken YAML: while parsing a flow node expected the node content, but found "
            "'<stream end>' in \"bad.yaml\", line 2",
        ),
        ("held_out: 2\ndata: x\noutput: y\n", "held_out=2 is not allowed"),
    ],
)
def test_a_file_of_settings_is_checked(folder, text, said):
    (folder / "bad.yaml").write_text(text)
    assert said in run("train", "--config", "bad.yaml", code=1).stderr


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "hi"),
        ("eval", "--head", "head", "--data", "prompts.jsonl"),
        ("serve",),
        ("train", "--data", "pairs.jsonl", "--output", "never"),
    ],
    ids=lambda command: command[0],
)
def test_what_loads_the_model_is_handed_on(folder, command):
    said = run(*command, "--model", "model", "--model-kwargs", "attn_implementation=no-such-kind", code=1).stderr
    assert "no-such-kind" in said
    said = run(*command, "--model", "model", "--model-kwargs", "device_map", code=1).stderr
    assert "'device_map' is not of the form NAME=VALUE" in said
    said = run(*command, "--model", "model", "--model-kwargs", "device_map={", code=1).stderr
    assert "'device_map={' has a broken value" in said and "values are YAML" in said


def test_how_a_model_was_loaded_is_kept_with_the_head(folder):
    loads = ("--model-kwargs", "attn_implementation=eager")
    said = run("train", "--model", "model", "--data", "pairs.jsonl", "--output", "eager", *loads, *QUICK).stdout
    assert "--model-kwargs 'attn_implementation=\"eager\"'" in said and "model_kwargs={'attn_impl" in said
    kept = "model_kwargs:\n  attn_implementation: eager\n"
    assert kept in Path("eager/train.yaml").read_text()
    assert MARAHead.from_pretrained("eager").config.training["model_kwargs"] == {"attn_implementation": "eager"}
    secret = ("--model-kwargs", "token=hf_secret")
    assert "set HF_TOKEN" in run("train", "--data", "pairs.jsonl", "--output", "never", *secret, code=1).stderr


def test_what_a_file_leaves_out_is_needed_as_a_flag(folder):
    (folder / "half.yaml").write_text("data: pairs.jsonl\n")
    assert "--output" in run("train", "--config", "half.yaml", code=2).stderr


def test_a_dry_run_checks_everything_and_writes_nothing(folder):
    data = ("--data", "prompts.jsonl", "--reward", VOWELS)
    said = run("train", "--dry-run", "--model", "model", "--output", "dry", *data, *QUICK).stdout
    for line in (
        "Method rloo",
        "as the model sees them",
        "for 60 replies of up to 8 tokens",
        "the evaluation",
        "free on the disk",
    ):
        assert line in said
    assert said.endswith("nothing was written.\n") and not (folder / "dry").exists()
    (folder / "worse.py").write_text("def judge(completions, **_):\n    return [None, 'x']\n")
    failing = ("--data", "prompts.jsonl", "--reward", "worse.py:judge")
    assert "returned 'x'" in run("train", "--dry-run", "--model", "model", "--output", "dry", *failing, code=1).stderr


def test_a_dry_run_on_pairs_counts_what_has_to_be_read(folder):
    flags = ("--dry-run", "--model", "model", "--output", "dry", "--data", "pairs.jsonl", *QUICK)
    assert "for 24 replies of up to 8 tokens" in run("train", *flags, "--form", "value").stdout
    # 24 to step along, and six to each prompt that set the scale and what greedy requests get
    assert "for 120 replies of up to 8 tokens" in run("train", *flags).stdout


def test_a_dry_run_refuses_a_disk_that_is_too_small(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    said = run("train", "--dry-run", "--model", "model", "--output", "dry", "--data", "pairs.jsonl", *QUICK, code=1)
    assert "'dry' has 0 MiB of free space; the run stores about " in said.stderr


class FakeHub:
    """What `huggingface_hub.HfApi` was asked."""

    asked: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self, token=None):
        pass

    def whoami(self):
        if os.environ.get("HF_TOKEN") != "right":
            raise OSError("Invalid user token.")

    def repo_info(self, repo_id):
        if repo_id != "me/open":
            raise RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://x"))
            )
        return SimpleNamespace(private=False)

    def create_repo(self, repo_id, private, exist_ok):
        self.asked.append(("create", repo_id, "private" if private else "public"))

    def upload_folder(self, repo_id, folder_path, commit_message):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.asked.append(("upload", repo_id, *names))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_a_finished_head_is_pushed_to_the_hub_and_nothing_else_of_its_folder(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    training = ("train", "--model", "model", "--data", "pairs.jsonl", "--output", "pushed", "--eval-prompts", 0, *QUICK)
    refused = run(*training, "--push-to-hub", "me/head", code=1)
    assert "can't push to 'me/head': Invalid user token." in refused.stderr and not (folder / "pushed").exists()
    monkeypatch.setenv("HF_TOKEN", "right")
    (folder / "pushed").mkdir()
    (folder / "pushed" / "notes.txt").write_text("mine")
    assert "https://huggingface.co/me/head/commit/1" in run(*training, "--push-to-hub", "me/head").stdout
    files = ("README.md", "head.safetensors", "head_config.json")
    assert FakeHub.asked == [("create", "me/head", "private"), ("upload", "me/head", *files)]


def test_a_head_becomes_public_only_when_that_is_said(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    monkeypatch.setenv("HF_TOKEN", "right")
    training = ("train", "--model", "model", "--data", "pairs.jsonl", "--output", "open", "--eval-prompts", 0, *QUICK)
    refused = run(*training, "--push-to-hub", "me/open", code=1)
    assert "'me/open' is public" in refused.stderr and not (folder / "open").exists()
    run(*training, "--push-to-hub", "me/open", "--public")
    assert FakeHub.asked[0] == ("create", "me/open", "public")


def test_an_interrupted_training_says_that_it_can_go_on_and_does(folder):
    reward = folder / "interrupting.py"
    reward.write_text("def judge(completions, **_):\n    raise KeyboardInterrupt\n")
    command = (
        "train",
        "--model",
        "model",
        "--data",
        "prompts.jsonl",
        "--output",
        "again",
        "--reward",
        f"{reward}:judge",
    )
    stopped = run(*command, *QUICK, code=130)
    assert stopped.stderr.count("\n") == 1 and "same command continues" in stopped.stderr
    assert not (folder / "again" / "head_config.json").exists()
    reward.write_text("def judge(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    run(*command, *QUICK)
    assert MARAHead.from_pretrained("again").config.method == "rloo"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"data": "{bad}/empty.jsonl"}, "empty.jsonl is empty"),
        ({"data": "{bad}/row.jsonl"}, "row.jsonl:13: "),
        ({"data": "prompts.jsonl"}, "prompts alone"),
        ({"model": "no-such/model"}, "no-such/model"),
        ({"reward": "{bad}/raises.py:judge"}, "raised ValueError: first second"),
        ({"reward": "{bad}/short.py:judge"}, "returned a list of length 1 for "),
        ({"reward": "{bad}/short.py:absent"}, "has no 'absent'"),
        ({"reward": VOWELS, "forbid": "x"}, "either a reward or forbidden words"),
        ({"output": "prompts.jsonl/head", "reward": VOWELS}, "'prompts.jsonl/head'"),
        ({"held_out": 2}, "held_out=2.0 is not allowed"),
    ],
)
def test_training_refuses_in_one_line_and_leaves_no_half_head(folder, bad, options, said):
    data = "prompts.jsonl" if "reward" in options else "pairs.jsonl"
    given = {"model": "model", "data": data, "output": "{bad}/out", **options}
    flags = [
        text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value).format(bad=bad))
    ]
    assert said in refused("train", *flags, *QUICK)
    left = {path.name for path in (bad / "out").rglob("*")} if (bad / "out").exists() else set()
    assert not {name for name in left if name.startswith(("head", "README", ".head", ".README"))}
