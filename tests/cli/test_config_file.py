"""`--config FILE` of `generate`, `eval`, `serve` and others: their options in a YAML file."""

from __future__ import annotations

import json

import pytest
from commands import generate, refused, run

pytestmark = pytest.mark.usefixtures("in_the_folder")


@pytest.fixture
def config(folder, tmp_path):
    def write(text):
        (tmp_path / "settings.yaml").write_text(text)
        return str(tmp_path / "settings.yaml")

    return write


def test_a_file_says_what_the_options_say(config):
    file = config("model: model\nhead: head\nmax-new-tokens: 6\ntemperature: 1.0\nseed: 3\nengine: auto\n")
    by_flags = generate("hi", "--head", "head", "--temperature", 1.0, "--seed", 3)
    assert run("generate", "hi", "--config", file).stdout == by_flags


def test_options_on_the_command_line_replace_those_of_the_file(config):
    file = config("model: no-such-model\nmax_new_tokens: 2\nstream: false\njson: true\n")
    told = json.loads(run("generate", "hi", "--config", file, "--model", "model", "--stream").stdout)
    assert len(told["token_ids"]) == 2


def test_lists_and_mappings_are_options_that_are_repeated(config):
    file = config("head: {head: 0.5}\nmodel_kwargs: {attn_implementation: sdpa}\nstop: [a, b]\n")
    stops = ("--stop", "a", "--stop", "b")
    assert generate("hi", "--config", file) == generate("hi", "--head", "head=0.5", *stops)
    assert generate("hi", "--config", file, "--head", "head") == generate("hi", "--head", "head", *stops)


BAD = {
    "an unknown name": ("max_new_token: 8\n", "'max_new_token' is not a setting\nhint: did you mean max_new_tokens"),
    "the prompt": ("prompt: hi\n", "'prompt' is not a setting"),
    "a file in the file": ("config: other.yaml\n", "'config' is not a setting"),
    "several values": ("temperature: [1, 2]\n", "temperature=[1, 2] is not allowed"),
    "no settings": ("- model\n", "holds no settings"),
    "broken YAML": ("model: [\n", '.yaml", line 2'),
    "a value out of bounds": ("model: model\ntemperature: -1\n", "temperature=-1.0 is not allowed"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_a_file_is_checked(config, text, said):
    assert said in run("generate", "hi", "--config", config(text), code=1).stderr


def test_a_value_of_another_kind_is_a_mistake_in_usage(config):
    said = run("generate", "hi", "--config", config("temperature: warm"), code=2).stderr
    assert "invalid value for '--temperature'" in said


def test_a_file_that_is_not_there_is_said():
    assert "'absent.yaml' can't be read" in refused("generate", "hi", "--config", "absent.yaml")


def test_eval_takes_what_it_needs_from_a_file(config):
    settings = (
        "model: model\nhead: [head]\ndata: prompts.jsonl\nmax_new_tokens: 4\nlimit: 2\n"
        "examples: 0\nreward: length?words=2"
    )
    assert "2 of prompts.jsonl" in run("eval", "--config", config(settings)).stdout
    assert "did you mean limit" in run("eval", "--config", config("limits: 2\n"), code=1).stderr


def test_serve_takes_its_heads_and_sizes_from_a_file(config):
    file = config("model: model\nhead: {brand: head}\nkv_bytes: 12 cups\n")
    assert "--kv-bytes '12 cups' is not allowed" in refused("serve", "--config", file)
    assert "two heads are called 'brand'" in refused("serve", "--config", config("head: [brand=head, brand=head]"))
    assert "did you mean port" in run("serve", "--config", config("ports: 8000\n"), code=1).stderr
