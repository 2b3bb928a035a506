"""Where data comes from beside plain files: saved data sets, the Hub, mixtures, columns of other names; its preview."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import Dataset, Labelled, PromptRow, preview, read_dataset
from mara_integrations.errors import ConfigError, DataError, MissingExtraError
from mara_integrations.messages import Message, PromptEncoder
from mara_integrations.testing import tiny_tokenizer

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(8)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(dataset: Dataset) -> list[str]:
    return [row.prompt[0].content for row in dataset.rows]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_list(PAIRS)
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": rows.select(range(5)), "test": rows.select([5])}).save_to_disk(folder / "split")
    return folder


class TestSavedDatasets:
    def test_a_folder_is_read_as_a_file_would_be(self, saved: Path, tmp_path: Path) -> None:
        read = read_dataset(saved / "one")
        assert read.rows[2].source == f"{saved / 'one'}:3"
        assert read.fingerprint == read_dataset(write(tmp_path / "prefs.jsonl", PAIRS)).fingerprint

    @pytest.mark.parametrize(("split", "count"), [("", 5), (":train", 5), (":test", 1)])
    def test_a_split_is_named_behind_a_colon_and_train_is_the_default(
        self, saved: Path, split: str, count: int
    ) -> None:
        assert len(read_dataset(f"{saved / 'split'}{split}")) == count

    def test_an_absent_split_is_refused_with_those_there_are(self, saved: Path) -> None:
        with pytest.raises(DataError, match="no split 'dev'") as caught:
            read_dataset(f"{saved / 'split'}:dev")
        assert "it has train, test" in (caught.value.hint or "")

    def test_a_damaged_folder_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets", reason="needs the data extra")
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(DataError, match="not a readable folder of datasets"):
            read_dataset(tmp_path)


class TestTheHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
        """A Hub with one data set."""
        datasets = pytest.importorskip("datasets", reason="needs the data extra")
        asked: list[tuple[str, str | None]] = []

        def load_dataset(name: str, split: str | None = None) -> Any:
            asked.append((name, split))
            if name != "org/prefs":
                raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
            rows = datasets.Dataset.from_list(PAIRS)
            return rows if split else datasets.DatasetDict({"train": rows})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    @pytest.mark.parametrize(("name", "split"), [("org/prefs", None), ("org/prefs:test[:8]", "test[:8]")])
    def test_a_name_with_a_split_is_loaded(self, asked: list[Any], name: str, split: str | None) -> None:
        assert len(read_dataset(name)) == 8
        assert asked == [("org/prefs", split)]

    def test_what_neither_the_hub_nor_the_disk_has_is_refused(self, asked: list[Any]) -> None:
        with pytest.raises(DataError, match="'org/absent' is not a file here, and the Hub gave no data set"):
            read_dataset("org/absent")

    def test_a_file_that_is_missing_is_not_looked_for_there(self, asked: list[Any], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            read_dataset("folder/prefs.jsonl")
        assert asked == []

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtraError, match=r"mara-integrations\[data\]"):
            read_dataset("org/prefs")


class TestColumns:
    def test_a_column_of_another_name_is_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", [{"question": "Hi?", "gold": "Yes"}])
        (row,) = read_dataset(path, columns={"prompt": "question"}).rows
        assert row == PromptRow((Message("user", "Hi?"),), {"gold": "Yes"}, f"{path}:1")

    def test_a_name_within_an_object_is_reached_by_dots(self, tmp_path: Path) -> None:
        rows = [{"in": {"q": "Hi?"}, "out": '{"text": "Yes"}', "ok": True}]
        columns = {"prompt": "in.q", "completion": "out.text", "label": "ok"}
        (row,) = read_dataset(write(tmp_path / "a.jsonl", rows), columns=columns).rows
        assert isinstance(row, Labelled) and (row.completion, row.label) == ("Yes", True)

    def test_a_comparison_makes_labels_of_scores(self, tmp_path: Path) -> None:
        rows = [{"prompt": "Hi?", "completion": "Yes", "stars": stars} for stars in (5, "4", 3.5)]
        dataset = read_dataset(write(tmp_path / "a.jsonl", rows), columns={"label": "stars >= 4"})
        assert [row.label for row in dataset.rows if isinstance(row, Labelled)] == [True, True, False]

    def test_a_score_that_is_no_number_is_a_bad_row(self, tmp_path: Path) -> None:
        rows = [{"prompt": "Hi?", "completion": "Yes", "stars": "many"}]
        with pytest.raises(DataError, match=r"a\.jsonl:1: 'stars' is 'many'"):
            read_dataset(write(tmp_path / "a.jsonl", rows), columns={"label": "stars>=4"})

    def test_a_column_that_no_row_has_is_refused_with_those_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no column 'quest', which 'prompt' was to be read from") as caught:
            read_dataset(write(tmp_path / "a.jsonl", PAIRS), columns={"prompt": "quest"})
        assert caught.value.hint == "its columns are prompt, chosen, rejected"

    def test_an_empty_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="'prompt=' names no column"):
            read_dataset(write(tmp_path / "a.jsonl", PAIRS), columns={"prompt": ""})


class TestMixtures:
    def mixture(self, folder: Path, *sources: str) -> Path:
        write(folder / "many.jsonl", [{**row, "prompt": f"many {i}"} for i, row in enumerate(PAIRS * 5)])
        write(folder / "few.jsonl", [{"q": f"few {i}", **row} for i, row in enumerate(PAIRS)])
        path = folder / "mix.yaml"
        path.write_text("sources:\n" + "".join(f"  - {source}\n" for source in sources))
        return path

    def test_weights_are_shares_of_the_rows_and_no_row_comes_twice(self, tmp_path: Path) -> None:
        path = self.mixture(tmp_path, "{path: many.jsonl, weight: 3}", "{path: few.jsonl, weight: 1}")
        dataset = read_dataset(path)
        names = questions(dataset)
        assert (sum(name.startswith("many") for name in names), len(names), len(set(names))) == (24, 32, 32)
        assert dataset.notes[0] == f"24 of 40 rows from {tmp_path / 'many.jsonl'}"

    def test_without_weights_all_rows_are_taken(self, tmp_path: Path) -> None:
        assert len(read_dataset(self.mixture(tmp_path, "{path: many.jsonl}", "{path: few.jsonl}"))) == 48

    def test_a_source_has_its_own_columns(self, tmp_path: Path) -> None:
        path = self.mixture(tmp_path, "{path: few.jsonl, columns: {prompt: q}}")
        assert questions(read_dataset(path))[0] == "few 0"

    def test_which_rows_are_taken_does_not_depend_on_their_order(self, tmp_path: Path) -> None:
        path = self.mixture(tmp_path, "{path: many.jsonl, weight: 1}", "{path: few.jsonl, weight: 1}")
        before = set(questions(read_dataset(path)))
        lines = (tmp_path / "many.jsonl").read_text().splitlines()
        (tmp_path / "many.jsonl").write_text("\n".join(reversed(lines)))
        assert set(questions(read_dataset(path))) == before

    @pytest.mark.parametrize(
        ("sources", "said"),
        [
            (["{path: many.jsonl, weight: 1}", "{path: few.jsonl}"], "some sources have a weight and some have none"),
            (["{path: absent.jsonl}"], "absent.jsonl does not exist"),
            (["{path: many.jsonl, weigth: 1}"], "sources.0.weigth"),
            (["{path: many.jsonl, weight: -1}"], "sources.0.weight=-1"),
            (["{path: many.jsonl}", "{path: few.jsonl, format: prompts}"], "many.jsonl (pairs)"),
            (["{path"], 'mix.yaml", line '),
        ],
    )
    def test_what_is_wrong_with_a_mixture_is_said(self, tmp_path: Path, sources: list[str], said: str) -> None:
        with pytest.raises(DataError) as caught:
            read_dataset(self.mixture(tmp_path, *sources))
        assert said in caught.value.message

    def test_a_list_alone_is_no_mixture(self, tmp_path: Path) -> None:
        (tmp_path / "mix.yaml").write_text("- many.jsonl\n")
        with pytest.raises(DataError, match="is not a mixture"):
            read_dataset(tmp_path / "mix.yaml")


class TestPreview:
    def test_it_shows_the_first_rows_as_the_model_will_see_them(self, tmp_path: Path) -> None:
        dataset = read_dataset(write(tmp_path / "prefs.jsonl", PAIRS))
        encoder = PromptEncoder(tiny_tokenizer())
        line, samples = preview(dataset, lambda row: encoder.render(row.prompt, row.tools))
        assert line == "8 preference pairs, standard"
        assert len(samples) == 2
        assert samples[0] == "[user] Question 0?\n[assistant] \n  chosen: Good 0.\n  rejected: Bad 0."
