"""Checked rows: how they are split by prompt, and their fingerprint."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datafiles import PAIR, write_csv, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.data import (
    Dataset,
    Labelled,
    PromptRow,
    read_dataset,
    split,
)
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.messages import Message

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).map("a{}".format)


def prompts_of(names: list[str]) -> Dataset:
    rows = (PromptRow((Message("user", name),), {}, f"rows.jsonl:{i}") for i, name in enumerate(names, start=1))
    return Dataset("prompts", tuple(rows), Path("rows.jsonl"))


def row_key(row: Any) -> str:
    return " ".join(row.prompt[0].content.split()).casefold()


class TestSplit:
    @given(names=st.lists(texts, min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
    def test_a_split_parts_all_rows_and_never_a_prompt(self, names: list[str], share: float, seed: int) -> None:
        dataset = prompts_of(names)
        if len({row_key(row) for row in dataset.rows}) < 2:
            return

        train, held_out = split(dataset, share, seed)

        assert len(train) > 0
        assert len(held_out) > 0
        assert sorted(row.source for row in train.rows + held_out.rows) == sorted(row.source for row in dataset.rows)
        assert not {row_key(row) for row in train.rows} & {row_key(row) for row in held_out.rows}

    @given(names=st.lists(texts, min_size=2, max_size=30), shuffle=st.randoms(use_true_random=False))
    def test_a_split_does_not_depend_on_the_order_of_rows(self, names: list[str], shuffle: random.Random) -> None:
        if len({row_key(row) for row in prompts_of(names).rows}) < 2:
            return
        _, before = split(prompts_of(names), 0.3)
        shuffle.shuffle(names)
        _, after = split(prompts_of(names), 0.3)
        assert {row_key(row) for row in before.rows} == {row_key(row) for row in after.rows}

    def test_prompts_that_differ_in_case_and_spacing_are_the_same(self) -> None:
        train, held_out = split(prompts_of(["Hello  there", "hello there ", "HELLO there", "Bye"]), 0.5)
        assert sorted([len(train), len(held_out)]) == [1, 3]

    def test_a_larger_share_holds_out_a_superset(self) -> None:
        dataset = prompts_of([f"prompt {i}" for i in range(100)])
        small, large = ({row.source for row in split(dataset, share)[1].rows} for share in (0.1, 0.2))
        assert (len(small), len(large)) == (10, 20)
        assert small < large

    def test_adding_rows_keeps_most_prompts_where_they_were(self) -> None:
        names = [f"prompt {i}" for i in range(1000)]
        _, before = split(prompts_of(names), 0.1)
        _, after = split(prompts_of(names + [f"new {i}" for i in range(100)]), 0.1)
        kept = {row_key(row) for row in before.rows} & {row_key(row) for row in after.rows}
        assert len(kept) >= 85  # of 100; by chance it would be ten

    def test_another_seed_gives_another_split(self) -> None:
        dataset = prompts_of([f"prompt {i}" for i in range(100)])
        assert split(dataset, seed=1)[1].fingerprint != split(dataset, seed=2)[1].fingerprint

    def test_one_prompt_can_not_be_split(self) -> None:
        with pytest.raises(DataError, match="all 2 rows have the same prompt"):
            split(prompts_of(["Hi", "hi"]))

    @given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2), st.floats(0.05, 0.95), st.integers(0, 9))
    def test_labels_are_on_both_sides_where_any_split_by_prompt_has_them_there(
        self, thumbs: list[tuple[int, bool]], share: float, seed: int
    ) -> None:
        rows = [
            Labelled((Message("user", str(prompt)),), "reply", label, f"rows.jsonl:{i}")
            for i, (prompt, label) in enumerate(thumbs)
        ]
        dataset = Dataset("labelled", tuple(rows), Path("rows.jsonl"))
        if len({prompt for prompt, _ in thumbs}) < 2:
            return
        good, bad = ({prompt for prompt, label in thumbs if label is wanted} for wanted in (True, False))

        sides = split(dataset, share, seed)

        if len(good) >= 2 and len(bad) >= 2:
            assert [{row.label for row in side.rows if isinstance(row, Labelled)} for side in sides] == [
                {True, False}, {True, False},
            ]  # fmt: skip
        assert sides == split(replace(dataset, rows=tuple(rows)), share, seed), "the same each time"
        assert not {row_key(row) for row in sides[0].rows} & {row_key(row) for row in sides[1].rows}

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 7])
    def test_a_share_outside_0_and_1_is_refused(self, share: float) -> None:
        with pytest.raises(ConfigError, match="held_out="):
            split(prompts_of(["Hi", "Bye"]), share)


class TestFingerprint:
    def test_it_changes_with_content_and_not_with_place(self, tmp_path: Path) -> None:
        here = read_dataset(write_jsonl(tmp_path / "here.jsonl", [PAIR]))
        there = read_dataset(write_csv(tmp_path / "there.csv", [PAIR]))
        other = read_dataset(write_jsonl(tmp_path / "other.jsonl", [{**PAIR, "chosen": "It is grey."}]))
        assert here.fingerprint == there.fingerprint
        assert here.fingerprint != other.fingerprint
