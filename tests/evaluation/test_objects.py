"""Prompts and rewards as Python objects: an evaluation of them is that of the same rows in a file."""

from __future__ import annotations

import json

import pytest

from mara_integrations import MARAEngine, evaluate
from mara_integrations.data import read_prompts
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.rewards import load_reward
from mara_integrations.testing import random_head

ROWS = [{"prompt": f"what is {i}?", "wanted": i} for i in range(4)]


def wanted(completions, wanted, **_):
    """Closeness of a reply's length to a column of its row."""
    return [-abs(len(text) - count) for text, count in zip(completions, wanted, strict=True)]


@pytest.fixture(scope="module")
def engine(loaded):
    return MARAEngine(loaded, random_head(32, accept_rate=0.4), max_new_tokens=6)


def evaluated(engine, prompts, rewards):
    """The tokens and scores of all replies, and the comparison of each reward."""
    found = evaluate(engine, prompts, rewards, max_new_tokens=6, temperature=0.9)
    replies = [reply for example in found.examples for reply in (example.base, example.gated)]
    return [(reply.token_ids, reply.scores) for reply in replies], found.rewards


@pytest.fixture
def of_a_file(engine, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return evaluated(engine, read_prompts(file), {"wanted": wanted})


def test_dicts_are_evaluated_as_the_rows_of_a_file(engine, of_a_file):
    assert evaluated(engine, ROWS, wanted) == of_a_file
    assert of_a_file[1]["wanted"].num_pairs == 4


def test_a_data_set_is_evaluated_as_the_rows_of_a_file(engine, of_a_file):
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    assert evaluated(engine, datasets.Dataset.from_list(ROWS), [wanted]) == of_a_file


def test_a_file_is_read_by_its_name(engine, of_a_file, tmp_path):
    assert evaluated(engine, str(tmp_path / "prompts.jsonl"), wanted) == of_a_file


def test_several_rewards_have_their_names(engine):
    vowels = load_reward("tests/reward_for_tests.py:vowels")
    assert list(evaluated(engine, ROWS, [wanted, vowels])[1]) == ["wanted", "vowels"]
    with pytest.raises(ConfigError, match="two rewards have the same name"):
        evaluate(engine, ROWS, [wanted, wanted])


@pytest.mark.parametrize("nothing", [[], (), {}])
def test_no_prompts_are_refused(engine, nothing):
    with pytest.raises(DataError):
        evaluate(engine, nothing, wanted)


def test_a_bad_row_is_named(engine):
    with pytest.raises(DataError, match=r"<rows>:2: .*'prompt' is missing"):
        evaluate(engine, [ROWS[0], {"wanted": 3}], wanted)
