"""`mara-tools` on a tiny model in a folder: every command, what it prints, and how it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from mara_integrations import __version__
from mara_integrations.cli import app
from mara_integrations.engine.tickets import Update
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.progress import Reporter
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.config import GROUPS, TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.run import start

ROOT = Path(__file__).parents[2]
VOWELS = f"{ROOT / 'tests' / 'reward_for_tests.py'}:vowels"
PROMPTS = [{"prompt": f"hello {i}"} for i in range(12)]
PAIRS = [{"prompt": f"say {i}", "chosen": "aeiou " * 2, "rejected": "xyz tqk " * 2} for i in range(12)]
QUICK = ("--max-reply-tokens", 8, "--replies-each", 2, "--epochs", 2, "--inner-size", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, heads for it, and data."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    random_head(32, "residual").save_pretrained(folder / "head")
    random_head(32, "paper").save_pretrained(folder / "paper-head")
    write_rows(folder / "prompts.jsonl", PROMPTS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # rewards make their folders importable


@pytest.fixture(scope="module")
def rewarded(folder):
    """What training on a reward said, and the head it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = ("--data", "prompts.jsonl", "--reward", VOWELS)
        return run("train", "--model", "model", "--output", "rewarded", "--system-prompt", "be kind", *data, *QUICK)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def generate(*arguments, **options):
    return run("generate", "--model", "model", "--max-new-tokens", 6, *arguments, **options).stdout


def tools(*arguments, **options):
    """A process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mara_integrations", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


# --- without a command ---


def test_several_heads_are_weighed_and_named_by_repeating_the_option():
    random_head(32, "residual", seed=1).save_pretrained("other")
    random_head(32, "residual", seed=1).save_pretrained("named=2")
    alone, both = (generate("hi", "--trace", "--head", "head", *more) for more in ((), ("--head", "other=0.5")))
    logits = [json.loads(out)["trace"][0]["candidates"][0]["accept_logit"] for out in (alone, both)]
    assert logits[0] != logits[1]
    assert generate("hi", "--head", "named=2") == generate("hi", "--head", "other"), "a folder may be called so"
    assert (
        "can be neither weighed nor composed"
        in run("generate", "hi", "--model", "model", "--head", "head", "--head", "paper-head", code=1).output
    )


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from mara_integrations.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'langchain_core', 'llama_index', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(heavy))\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        command = [sys.executable, "-c", program, *arguments]
        said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert said.stdout.splitlines()[-1] == "[]", said.stderr


def test_the_version_is_the_packages_and_python_m_is_mara_tools():
    assert tools("--version").stdout == f"mara-tools {__version__}\n"


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


# --- train ---


def test_training_on_a_reward_leaves_a_head_and_says_what_to_try(rewarded, folder):
    said = rewarded.stdout
    assert said.startswith("Training a head for model on prompts.jsonl, into rewarded\n")
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
    assert MARAHead.from_pretrained("on-pairs").config.form == "value"


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
        ("max_replys: 8\n", "'max_replys' is no setting\nhint: did you mean max_replies or max_reply_tokens?"),
        ("- data\n", "holds no settings"),
        ("data: [\n", "is broken YAML"),
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
    assert "'device_map' is no NAME=VALUE" in said
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
        "for 56 replies of up to 8 tokens",
        "the evaluation",
        "free on the disk",
    ):
        assert line in said
    assert said.endswith("nothing was written.\n") and not (folder / "dry").exists()
    (folder / "worse.py").write_text("def judge(completions, **_):\n    return [None, 'x']\n")
    failing = ("--data", "prompts.jsonl", "--reward", "worse.py:judge")
    assert "returned 'x'" in run("train", "--dry-run", "--model", "model", "--output", "dry", *failing, code=1).stderr


def test_a_dry_run_on_pairs_counts_what_has_to_be_read(folder):
    said = run("train", "--dry-run", "--model", "model", "--output", "dry", "--data", "pairs.jsonl", *QUICK).stdout
    assert "for 24 replies of up to 8 tokens" in said


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


# --- eval ---


def test_eval_takes_the_heads_own_reward_and_of_its_training_file_only_what_was_held_out(rewarded, folder):
    result = run(
        *("eval", "--model", "model", "--head", "rewarded", "--data", "prompts.jsonl"),
        *("--max-new-tokens", 5, "--report", "report.html", "--examples", 1, "--trust-head-code"),
    )
    assert "Prompts 2 of prompts.jsonl; the head was trained on this file" in result.stdout
    assert f"Rewards {VOWELS} (recorded with the head)" in result.stdout
    assert result.stdout.rstrip().endswith("Report  report.html")
    assert "hello" in Path("report.html").read_text()
    assert result.stderr == ""


def test_eval_with_rewards_of_its_own(folder):
    said = run(
        *("eval", "--model", "model", "--head", "head", "--data", "pairs.jsonl", "--limit", 3, "--examples", 0),
        *("--reward", VOWELS, "--reward", VOWELS, "--forbid", "However", "--max-new-tokens", 4, "--strength", 0),
        *("--report", "report.json"),
    ).stdout
    assert f"{VOWELS}; {VOWELS}; forbidden 'however'" in said
    report = json.loads(Path("report.json").read_text())
    assert len(report["rewards"]) == 3  # also the second of one name
    assert (len(report["examples"]), report["strength"]) == (3, 0.0)
    assert all(example["base"]["text"] == example["gated"]["text"] for example in report["examples"])


@pytest.mark.filterwarnings("default")  # pytest makes them errors
def test_eval_goes_on_without_a_recorded_reward_that_is_gone(folder):
    spec = {"kind": "function", "path": "gone.py:judge"}
    random_head(32, "residual", rewards=(spec,)).save_pretrained("orphan")
    asking = ("eval", "--model", "model", "--head", "orphan", "--data", "prompts.jsonl", "--max-new-tokens", 2)
    result = run(*asking, "--trust-head-code")
    assert result.stderr.startswith("warning: a reward that the head records is left out: reward 'gone.py:judge'")
    assert result.stderr.count("\n") == 1 and "Rewards none\n" in result.stdout


@pytest.mark.filterwarnings("default")  # pytest makes them errors
def test_eval_runs_no_code_that_a_head_names(folder):
    (folder / "evil.py").write_text("import os; os.mkdir('pwned')\ndef f(completions, **_): return [0.0]\n")
    spec = {"kind": "function", "path": "evil.py:f"}
    random_head(32, "residual", rewards=(spec,)).save_pretrained("hostile")
    asking = ("eval", "--model", "model", "--head", "hostile", "--data", "prompts.jsonl", "--max-new-tokens", 2)

    said = run(*asking).stderr

    assert not Path("pwned").exists()
    assert said == (
        "warning: the head records a reward that imports code ('evil.py:f'); it is left out: name it by --reward, or "
        "trust this head with --trust-head-code\n"
    )


# --- generate ---


def test_a_stream_and_a_whole_reply_are_the_same_and_the_engines_own():
    engine = MARAEngine("model", "head")
    assert generate("hi", "--raw", "--head", "head") == engine.generate("hi", raw=True, max_new_tokens=6).text + "\n"
    assert generate("hi", "--head", "head") == generate("hi", "--head", "head", "--no-stream")
    assert generate("hi", "--head", "head") != generate("hi", "--head", "head", "--strength", 0)


def test_a_prompt_can_come_from_standard_input():
    assert generate("-", stdin="hi\n") == generate("hi")


def test_json_tells_what_the_gate_did(folder_model, nothing_fed_ahead):
    asking = ("hi", "--model", folder_model, "--head", "head")
    plain, traced = (json.loads(generate(*asking, form)) for form in ("--json", "--trace"))
    assert plain["gate"]["rejected"] > 0 and len(plain["token_ids"]) == 6 and "trace" not in plain
    assert len(traced.pop("trace")) == 6 and traced == plain


def test_stop_strings_may_be_repeated():
    text = json.loads(generate("hi", "--json"))["text"]
    stops = ("--stop", text[1], "--stop", text[3])
    assert json.loads(generate("hi", "--json", *stops))["text"] == text[:1]


def test_explain_marks_what_was_rejected_and_counts_it():
    asking = ("explain", "hi", "--model", "model", "--max-new-tokens", 6)
    reply, counts, meanings = run(*asking, "--head", "head").stdout.rstrip("\n").rsplit("\n", 2)
    assert "[-" in reply and counts.startswith("6 tokens: ")
    assert "accepted: the head let the candidate pass" in meanings
    assert "rejected by the head" in reply.splitlines()[-1], "the marks are explained also where they are no colours"
    assert "nothing to explain" in run(*asking, code=2).stderr


def test_a_reader_who_leaves_early_is_no_error(folder):
    command = f"{sys.executable} -m mara_integrations generate hi --model model --max-new-tokens 400 | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, shell=True, capture_output=True, env=environment, timeout=120)
    assert len(said.stdout) == 1 and said.stderr == b""


# --- chat ---


def test_a_chat_remembers_and_obeys():
    said = run(
        *("chat", "--model", "model", "--head", "head", "--max-new-tokens", 5),
        stdin="hi\n/base\n/gate\n/strength 0\n/reset\nhi\nhi\n/help\n/exit\nnever asked\n",
    )
    engine = MARAEngine("model", "head", max_new_tokens=5)
    assert said.stderr == ""
    for text in (generate("hi", "--max-new-tokens", 5, "--head", "head"), "5 tokens: ", "strength 0\n", "/reset  "):
        assert text in said.stdout
    assert said.stdout.count(generate("hi", "--max-new-tokens", 5)) >= 2  # /base, then strength 0 after /reset
    assert engine.model.name == "model"


def test_a_chat_goes_on_after_a_mistake():
    said = run("chat", "--model", "model", "--max-new-tokens", 3, stdin="/base\n/gate\n/strength 1\n/fly\nhi\n")
    errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1][:12] for error in errors] == [
        "there is no ",
        "there is no ",
        "strength is ",
        "'/fly' is no",
    ]
    assert generate("hi", "--max-new-tokens", 3) in said.stdout


def test_a_paper_head_has_no_dial():
    said = run("chat", "--model", "model", "--head", "paper-head", stdin="/strength 0.5\n")
    assert "a 'paper' head is on (1) or off (0)" in said.stderr


def test_an_interrupted_answer_does_not_end_the_chat(monkeypatch):
    asked = []

    def stream(self, prompt, **_):
        asked.append([message.content for message in prompt])
        yield Update("Half", (1,))
        raise KeyboardInterrupt

    monkeypatch.setattr(MARAEngine, "stream", stream)
    said = run("chat", "--model", "model", stdin="one\ntwo\n")
    assert said.stdout.count("Half (stopped)") == 2
    assert asked == [["one"], ["one", "Half", "two"]]


# --- heads on disk ---


def test_inspect_tells_what_a_head_is(folder):
    said = run("inspect", "head").stdout
    said = " ".join(said.split())
    assert "Head head, form residual, 32 -> 64 -> 16 -> 1, 3,233 parameters" in said
    assert "Model unknown" in said and "Scale 1: at strength 1" in said
    whole = json.loads(run("inspect", "head", "--json").stdout)
    assert whole["parameters"] == 3233 and whole["fingerprint"] == MARAHead.from_pretrained("head").fingerprint


def test_inspect_tells_how_a_training_went(rewarded):
    said = " ".join(run("inspect", "rewarded").stdout.split())
    for line in (
        "Method rloo",
        "rows and 2 held out",
        "with mara_integrations 0",
        "On held-out prompts",
        "kl per token: ",
    ):
        assert line in said
    assert "vowels" in said and "distinct-2" in said and "\u2502 base \u2502 gated" in said.replace("\u2503", "\u2502")


def test_a_published_actor_becomes_a_folder_that_judges_alike(folder):
    head = random_head(32, "paper")
    torch.save(head.state_dict(), folder / "actor.pth")
    run("convert", "actor.pth", "--output", "converted", "--base-model", "model")
    converted = MARAHead.from_pretrained("converted")
    assert (converted.config.form, converted.config.base_model) == ("paper", "model")
    assert generate("hi", "--head", "converted") == generate("hi", "--head", "actor.pth")
    assert "is a folder" in run("convert", "head", "--output", "again", code=1).stderr


def test_merged_heads_are_one_that_answers_like_their_composition(folder):
    random_head(32, "residual", seed=1, scale=0.7).save_pretrained("other")
    run("merge", "head", "other=0.5", "--output", "merged")
    composed = {MARAHead.from_pretrained("head"): 1.0, MARAHead.from_pretrained("other"): 0.5}
    expected = MARAEngine("model", composed).generate([Message("user", "hi")], max_new_tokens=6).text
    assert generate("hi", "--head", "merged") == expected + "\n"
    assert "nothing to merge" in run("merge", "head", "--output", "x", code=1).stderr
    assert "'paper' form can't be merged" in run("merge", "head", "paper-head", "--output", "x", code=1).stderr


@pytest.mark.parametrize("name", ["escaped", "../escaped", "/tmp/escaped"])
def test_merge_copies_what_training_kept_and_writes_nowhere_else(folder, name, tmp_path):
    (tmp_path / "secret").write_text("the private key")
    spec = {"kind": "reward_model", "name": name, "file": "rewards/x.safetensors", "sha256": "0" * 64}
    hostile = random_head(32, "residual", rewards=(spec,)).save_pretrained(tmp_path / "in/hostile")
    (hostile / "rewards").mkdir()
    (hostile / "rewards" / "x.safetensors").symlink_to(tmp_path / "secret")

    said = run("merge", "head", hostile, "--output", tmp_path / "out/merged", code=1).stderr

    assert "x.safetensors' is a link out of the head's folder" in said
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and "hostile" not in str(path)} == {"secret"}


def test_merge_writes_a_reward_model_of_any_name_into_its_folder(folder, tmp_path):
    kept = tmp_path / "in/rewards/x.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"data")
    sha256 = hashlib.sha256(b"data").hexdigest()
    spec = {"kind": "reward_model", "name": "../../../escaped", "file": "rewards/x.safetensors", "sha256": sha256}
    random_head(32, "residual", rewards=(spec,)).save_pretrained(tmp_path / "in")

    run("merge", "head", tmp_path / "in", "--output", tmp_path / "out/merged")

    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert written == {"merged/head.safetensors", "merged/rewards/escaped.safetensors"}


def test_inspect_prints_no_control_characters(folder, tmp_path):
    training = {"system_prompt": "\x1b]0;title\x07", "\x1b[2J": 1}
    metrics = {"\x1b[2J": 1.0}
    random_head(32, "residual", training=training, metrics=metrics, rewards=({"kind": "\x1b[2J"},)).save_pretrained(
        tmp_path / "h"
    )
    for form in ((), ("--json",)):
        assert "\x1b" not in run("inspect", tmp_path / "h", *form).stdout


# --- bad input ---

BAD_REWARDS = {
    "raises": "def judge(completions, **_):\n    raise ValueError('first\\nsecond')\n",
    "short": "def judge(completions, **_):\n    return [0.0]\n",
}


@pytest.fixture
def bad(folder, tmp_path):
    """Things that can't be used."""
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "row.jsonl", [*PAIRS, {"prompt": "x", "rejected": "y"}])
    random_head(48, "residual").save_pretrained(tmp_path / "wide")
    random_head(32, "residual").save_pretrained(tmp_path / "corrupt")
    (tmp_path / "corrupt" / "head.safetensors").write_bytes(b"\x00" * 40)
    for name, text in BAD_REWARDS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def refused(*arguments):
    """The one error line, without its label."""
    result = run(*arguments, code=1)
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ") and len(rest) <= 1 and all(line.startswith("hint: ") for line in rest)
    assert "Traceback" not in result.output
    return first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"data": "{bad}/empty.jsonl"}, "empty.jsonl is empty"),
        ({"data": "{bad}/row.jsonl"}, "row.jsonl:13: "),
        ({"data": "prompts.jsonl"}, "prompts alone"),
        ({"model": "no-such/model"}, "no-such/model"),
        ({"reward": "{bad}/raises.py:judge"}, "raised ValueError: first second"),
        ({"reward": "{bad}/short.py:judge"}, "returned 1 numbers for "),
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "absent"}, "'absent'"),
        ({"head": "{bad}/wide"}, "expects hidden size 48; model 'model' has 32"),
        ({"head": "{bad}/corrupt"}, "head.safetensors' is damaged"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"reward": "{bad}/raises.py:judge"}, "raised ValueError: first second"),
        ({"reward": "{bad}/short.py:judge"}, "returned 1 numbers for "),
        ({"report": "report.pdf"}, "report.pdf"),
        ({"report": "prompts.jsonl/report.html"}, "prompts.jsonl"),
        ({"temperature": -1}, "temperature=-1.0 is not allowed"),
    ],
)
def test_eval_refuses_in_one_line_and_writes_no_report(folder, bad, options, said):
    given = {"model": "model", "head": "head", "data": "prompts.jsonl", "report": "{bad}/report.html", **options}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value).format(bad=bad))]
    assert said in refused("eval", *flags, "--max-new-tokens", 2)
    assert not list(bad.glob("*report*"))


def test_a_usage_error_has_exit_code_2():
    assert "--nonsense" in run("generate", "hi", "--nonsense", code=2).stderr
    assert "--data" in run("train", "--output", "x", code=2).stderr


def test_a_traceback_comes_only_with_debug_which_may_stand_anywhere():
    for arguments in (["--debug", "generate", "hi"], ["generate", "hi", "--debug"]):
        result = CliRunner().invoke(app, [*arguments, "--model", "absent/model"])
        assert result.exit_code == 1 and type(result.exception).__name__ == "ModelError"


def test_an_unexpected_error_is_one_line_too(monkeypatch):
    def stream(self, prompt, **_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(MARAEngine, "stream", stream)
    result = run("generate", "hi", "--model", "model", code=1)
    assert result.stderr == "error: unexpected RuntimeError: no luck\nhint: run again with --debug to see where\n"
