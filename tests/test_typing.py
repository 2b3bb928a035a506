"""What a type checker tells a user: which settings there are, and what comes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SNIPPET = """
from typing import TypedDict
from pydantic import BaseModel
from mara_integrations import MARAEngine, MARALLM, ChatMARA

class Ticket(BaseModel):
    title: str

class Row(TypedDict):
    title: str

def check(engine: MARAEngine, llm: MARALLM, chat: ChatMARA) -> None:
    reveal_type(engine.generate("hi", temperature=0.5, head=None, max_tokens=3).text)  # is: str
    engine.generate("hi", temprature=0.5)  # error: call-arg
    engine.generate("hi", temperature="warm")  # error: arg-type
    engine.stream("hi", selection="best")  # error: arg-type
    engine.with_settings(strenght=2.0)  # error: call-arg
    MARAEngine("m", top_p=0.9, seed=None)
    MARAEngine("m", topp=0.9)  # error: call-arg
    reveal_type(llm.with_structured_output(Ticket).invoke("hi"))  # is: Ticket
    reveal_type(chat.with_structured_output(Ticket).invoke("hi"))  # is: Ticket
    reveal_type(chat.with_structured_output(Ticket, method="function_calling").invoke("hi"))  # is: Ticket
    reveal_type(chat.with_structured_output(Row).invoke("hi")["title"])  # is: str
    reveal_type(chat.with_structured_output({"type": "object"}).invoke("hi"))  # is: dict
    reveal_type(chat.with_structured_output(Ticket, include_raw=True).invoke("hi"))  # is: dict
    chat.with_structured_output(Ticket, method="json")  # error: call-overload
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What mypy says of each line."""
    api = pytest.importorskip("mypy.api")
    file = tmp_path_factory.mktemp("typing") / "snippet.py"
    file.write_text(SNIPPET, encoding="utf-8")
    root = Path(__file__).parents[1]
    settings = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    output, errors, _ = api.run([*settings, "--show-error-codes", "--no-pretty", str(file)])
    assert not errors
    lines: dict[int, str] = {}
    for said in output.splitlines():
        if place := re.match(r".*snippet\.py:(\d+):(?:\d+:)? (.*)", said):
            lines[int(place[1])] = f"{lines.get(int(place[1]), '')} {place[2]}"
    return lines


LINES = [(number, line) for number, line in enumerate(SNIPPET.splitlines(), start=1) if line.startswith("    ")]


@pytest.mark.parametrize(("number", "line"), [each for each in LINES if "title: str" not in each[1]])
def test_a_wrong_setting_is_an_error_and_a_result_has_its_type(number: int, line: str, found: dict[int, str]) -> None:
    said = found.get(number, "")

    if "# error:" in line:
        assert f"[{line.rpartition('# error: ')[2]}]" in said
    elif "# is:" in line:
        assert re.search(rf'Revealed type is "[^"]*\b{line.rpartition("# is: ")[2]}\b', said) and "error" not in said
    else:
        assert said == ""
