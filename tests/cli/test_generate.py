"""`mara-tools generate` and `explain` on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
from commands import ROOT, generate, run
from scripted import writes

from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head

pytestmark = pytest.mark.usefixtures("in_the_folder")


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
    assert "rejected by the head" in reply.splitlines()[-1], "the marks are explained also where they are not colours"
    assert "nothing to explain" in run(*asking, code=2).stderr


@pytest.mark.slow
def test_a_reader_who_leaves_early_is_no_error(folder):
    command = f"{sys.executable} -m mara_integrations generate hi --model model --max-new-tokens 400 | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, shell=True, capture_output=True, env=environment, timeout=120)
    assert len(said.stdout) == 1 and said.stderr == b""


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


@pytest.fixture
def thinking(monkeypatch):
    """Lets commands ask a model that thinks before it answers."""
    engine = writes("<think>\nA cat?\x07\n</think>\n\nYes.").engine
    for command in ("generate", "chat"):
        module = import_module(f"mara_integrations.cli.{command}")  # the package has the function of this name
        monkeypatch.setattr(module, "engine_for", lambda asking, **more: engine)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_a_reply_that_is_piped_is_the_answer_alone(thinking, how):
    said = run("generate", "Is it?", how)
    assert (said.stdout, said.stderr) == ("Yes.\n", "")


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_thoughts_go_to_standard_error(thinking, how):
    said = run("generate", "Is it?", "--thoughts", how)
    assert said.stdout == "Yes.\n"
    assert said.stderr.strip() == "A cat?\u2407", "control characters of a model are never obeyed"


def test_json_has_the_thoughts_apart(thinking):
    reply = json.loads(run("generate", "Is it?", "--json").stdout)
    assert (reply["text"], reply["thoughts"]) == ("Yes.", "A cat?\x07")


def test_a_reply_that_ends_within_its_thoughts_is_explained(monkeypatch):
    engine = writes("<think>\nA cat?", max_tokens=12).engine
    module = import_module("mara_integrations.cli.generate")
    monkeypatch.setattr(module, "engine_for", lambda asking, **more: engine)
    said = run("generate", "Is it?", "--no-thoughts")
    assert said.stdout == "\n" and "raise --max-new-tokens" in said.stderr


def test_a_chat_remembers_the_answer_without_the_thoughts(thinking, monkeypatch):
    asked = []
    stream = MARAEngine.stream

    def noted(self, prompt, **settings):
        asked.append([message.content for message in prompt])
        return stream(self, prompt, **settings)

    monkeypatch.setattr(MARAEngine, "stream", noted)
    said = run("chat", "--thoughts", stdin="one\ntwo\n")
    assert said.stdout.count("Yes.\n") == 2 and said.stderr.count("A cat?") == 2
    assert asked == [["one"], ["one", "Yes.", "two"]]


READS_TRACES = {"generate": ("hi", "--trace"), "explain": ("hi",), "eval": ("--data", "prompts.jsonl")}


@pytest.mark.parametrize("command", READS_TRACES.items(), ids=READS_TRACES)
def test_what_reads_traces_is_refused_on_vllm_before_the_model_is_looked_for(command):
    name, arguments = command
    said = run(name, *arguments, "--head", "head", "--model", "no-such-model", "--engine", "vllm", code=1).stderr
    assert "trace=True can't be done by engine='vllm'" in said and "engine='transformers'" in said
