"""`mara-tools chat` on a tiny model."""

from __future__ import annotations

import pytest
from commands import generate, run, tools

from mara_integrations.engine.tickets import Update
from mara_integrations.replies.calls import Piece
from mara_integrations.runtime import MARAEngine

pytestmark = pytest.mark.usefixtures("in_the_folder")


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


def test_a_chat_goes_on_after_bytes_that_are_not_utf_8(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most locales
    typed = tmp_path / "typed"
    typed.write_bytes(b"caf\xe9?\nhi\n")
    with typed.open("rb") as stdin:
        said = tools("chat", "--model", "model", "--max-new-tokens", 3, stdin=stdin)
    assert said.returncode == 0 and generate("hi", "--max-new-tokens", 3) in said.stdout
    assert "half of a surrogate pair" in said.stderr and "unexpected" not in said.stderr


def test_a_paper_head_has_no_dial():
    said = run("chat", "--model", "model", "--head", "paper-head", stdin="/strength 0.5\n")
    assert "a 'paper' head is on (1) or off (0)" in said.stderr


def test_an_interrupted_answer_does_not_end_the_chat(monkeypatch):
    asked = []

    def stream(self, prompt, **_):
        asked.append([message.content for message in prompt])
        yield Update("Half", (1,), (Piece("Half"),))
        raise KeyboardInterrupt

    monkeypatch.setattr(MARAEngine, "stream", stream)
    said = run("chat", "--model", "model", stdin="one\ntwo\n")
    assert said.stdout.count("Half (stopped)") == 2
    assert asked == [["one"], ["one", "Half", "two"]]
