"""Several processes that hold one model: the tokens and the head of one process, said and written once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mara_integrations.cli import main
from mara_integrations.errors import ConfigError, EngineClosedError
from mara_integrations.heads.head import MARAHead
from mara_integrations.models import ranks
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

ROOT = Path(__file__).parents[3]
PROMPTS = [f"{'Tell me more. ' * n}Say {n}" for n in range(5)]
SETTINGS = {"temperature": 1.0, "max_new_tokens": 10, "seed": 3}

has_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, by which processes talk on the CPU",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a head and preferences on disk."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(eos_token_id=0, tie_word_embeddings=True).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    random_head(32).save_pretrained(folder / "head")
    pairs = [{"prompt": f"Say {n}", "chosen": "yes yes, good", "rejected": "no no, bad"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return folder


def two_processes(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MARA_CACHE_DIR": str(folder / "cache"),
    }
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=240, check=False
    )


def test_a_model_is_not_spread_over_one_process():
    with pytest.raises(ConfigError, match=r"tp_plan='auto' spreads a model over several processes.*torchrun"):
        load_model(ModelSpec("smollm2", model_kwargs={"tp_plan": "auto"}))


def test_processes_on_ray_hold_whole_models():
    with pytest.raises(ConfigError, match="either ray or tp_plan"):
        TrainConfig.of(data="pairs.jsonl", output="head", ray=2, model_kwargs={"tp_plan": "auto"})


def test_nobody_is_asked_when_the_others_have_ended():
    with pytest.raises(EngineClosedError, match="start all again"):
        ranks.everywhere(len, "abc")


_SCRIPT = f"""
import json, sys
from contextlib import closing
from pathlib import Path
from mara_integrations.cli import main
from mara_integrations.runtime import MARAEngine

engine = MARAEngine("model", "head", model_kwargs={{"tp_plan": "auto"}}).load()  # here the second process stays
with closing(engine.stream({PROMPTS[0]!r}, **{SETTINGS})) as updates:
    next(updates)
replies = engine.generate_batch({PROMPTS}, **{SETTINGS})
weight = engine.model.model.model.layers[0].self_attn.q_proj.weight.to_local()
Path("written.json").write_text(json.dumps([[reply.token_ids for reply in replies], list(weight.shape)]))
main()  # trains: the arguments of this script are those of `mara-tools`
"""
TRAINING = {"dtype": "float32", "max_reply_tokens": 8, "inner_size": 16, "epochs": 2, "eval_prompts": 2}


@pytest.fixture(scope="module")
def said(folder):
    """What two processes say that write replies and then train a head."""
    (folder / "script.py").write_text(_SCRIPT)
    flags = [flag for name, value in TRAINING.items() for flag in (f"--{name.replace('_', '-')}", str(value))]
    model = ("--model", "model", "--model-kwargs", "tp_plan=auto")

    said = two_processes(folder, "script.py", "train", *model, "--data", "pairs.jsonl", "--output", "together", *flags)

    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.mark.slow
@has_gloo
def test_two_processes_write_the_tokens_of_one(folder, said):
    tokens, shape = json.loads((folder / "written.json").read_text())
    assert shape == [16, 32]  # half of its rows
    alone = MARAEngine(str(folder / "model"), str(folder / "head")).generate_batch(PROMPTS, **SETTINGS)
    assert tokens == [list(reply.token_ids) for reply in alone]


@pytest.mark.slow
@has_gloo
def test_two_processes_train_the_head_of_one(folder, said):
    assert said.count("Training a head") == said.count("Try it") == 1
    assert "torchrun --nproc-per-node 2 -m mara_integrations chat" in said
    config = TrainConfig.of(
        model=str(folder / "model"), data=folder / "pairs.jsonl", output=folder / "alone", **TRAINING
    )
    alone = train(config).head
    together = MARAHead.from_pretrained(folder / "together")
    for name, weight in alone.state_dict().items():
        assert torch.allclose(weight, together.state_dict()[name], atol=1e-5), name
    events = [json.loads(line)["event"] for line in (folder / "together" / "metrics.jsonl").read_text().splitlines()]
    assert events.count("start") == events.count("done") == 1


@has_gloo
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists the threads of a process")
def test_no_thread_of_the_group_of_messages_is_left_when_the_interpreter_ends(tmp_path):
    """A thread that dropped the last message's tensor at that moment aborted the process after all of its work."""
    script = f"""
import atexit, os, time, torch.distributed as dist

def threads():
    return set(os.listdir("/proc/self/task"))

@atexit.register  # before all else, so it runs last
def write_threads():
    for _ in range(500):  # one that has ended is listed for a moment
        if not own & threads():
            break
        time.sleep(0.01)
    print(len(own), len(own & threads()))

dist.init_process_group("gloo", init_method={(tmp_path / "store").as_uri()!r}, rank=0, world_size=1)
from mara_integrations.models import ranks
others = threads()
ranks._control = dist.new_group(backend="gloo")
own = threads() - others
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    count, left = map(int, said.stdout.split())
    assert count > 0 == left


def test_a_process_that_follows_says_nothing_on_the_command_line(monkeypatch, capsys):
    class Followed(BaseException):
        """In the place of following, from which no process returns."""

    def follow():
        raise Followed

    monkeypatch.setattr(ranks, "has_others", lambda: True)
    monkeypatch.setattr(ranks, "join", follow)
    monkeypatch.setattr(sys, "argv", ["mara-tools", "recipes"])
    with pytest.raises(Followed):
        main()
    assert capsys.readouterr() == ("", "")
