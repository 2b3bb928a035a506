"""The card in a head's folder says what the head is, where it comes from, and only what is known."""

from __future__ import annotations

from mara_integrations.heads.card import Results, model_card
from mara_integrations.heads.config import HeadConfig, Origin

ORIGIN = Origin(
    date="2026-01-02 03:04 UTC",
    command="mara-tools train \\\n    --data prefs.jsonl",
    data="prefs.jsonl",
    num_rows=90,
    num_held_out_rows=10,
    versions={"torch": "2.13.0", "Python": "3.11.7"},
)
REWARD = {"kind": "reward_model", "name": "pairs", "file": "rewards/pairs.safetensors", "sha256": "0" * 64}
TRAINED = HeadConfig(
    hidden_size=16,
    base_model="org/name",
    scale=1.23456,
    method="reward-model",
    system_prompt="Be brief.\n\nBe kind.",
    rewards=(REWARD,),
    data_fingerprint="abc123",
    origin=ORIGIN,
)


def test_a_trained_head_tells_its_data_command_and_rewards():
    card = model_card(TRAINED, why="there are 400 pairs")
    assert "base_model: org/name" in card and 'MARALLM(model="org/name"' in card
    assert "scale 1.23, candidates top-k 40, top-p 0.95" in card
    assert "in greedy decoding strength 1 and top-p 0.95" in card
    assert "Trained by `reward-model` because there are 400 pairs." in card
    assert "Data: `prefs.jsonl`, 90 rows to fit on, 10 held out." in card
    assert "torch 2.13.0, Python 3.11.7" in card and "Hash of the training data: `abc123`." in card
    assert "`rewards/pairs.safetensors` (pairs)" in card


def test_lines_of_prompts_and_commands_stay_in_their_block():
    lines = model_card(TRAINED).splitlines()
    assert [line for line in lines if line.startswith(">")] == ["> Be brief.", ">", "> Be kind."]
    assert "    mara-tools train \\" in lines and "        --data prefs.jsonl" in lines


def test_results_are_a_table_of_base_model_and_head():
    rows = (("keeps to the style", "52.8 %", "98.6 %"), ("perplexity", "2.02", "2.12"))
    card = model_card(TRAINED, results=Results(72, rows))
    assert "## On 72 held-out prompts" in card
    assert "| keeps to the style | 52.8 % | 98.6 % |\n| perplexity | 2.02 | 2.12 |" in card


def test_what_is_unknown_is_left_out():
    card = model_card(HeadConfig(hidden_size=16))
    assert "# MARA head for unknown" in card
    for heading in ("Trained by", "Data:", "Hash of", "Reward models", "held-out", "Limits", "system prompt"):
        assert heading not in card
