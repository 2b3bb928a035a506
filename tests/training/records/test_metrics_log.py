"""metrics.jsonl: a damaged file, or something else under its name, never ends a run with anything but a clear error."""

from __future__ import annotations

import json

import pytest

from mara_integrations.errors import OutputError
from mara_integrations.training.records.metrics_log import METRICS_FILE, MetricsLog


def run(folder, *values):
    log = MetricsLog(folder)
    with log.opened("run", (), {"config": {}}):
        for value in values:
            log.log("fit", {"loss": value})


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    "content",
    ['{"loss": 1}\n', '{"event": "start"}\n', '{"event": 3, "elapsed_s": "x"}\n', "[1]\n", "[" * 100_000, "\xff\0\n"],
    ids=["no event", "no time", "other types", "a list", "too deep", "no JSON"],
)
def test_a_damaged_file_is_started_again(tmp_path, content):
    (tmp_path / METRICS_FILE).write_text(content, encoding="latin-1")
    run(tmp_path, 1.0)
    assert [line["event"] for line in lines(tmp_path)] == ["start", "fit"]


def test_a_damaged_line_ends_what_is_continued(tmp_path):
    run(tmp_path, 1.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"event": "fit", "lo')
    run(tmp_path, 1.0, 2.0)
    assert [line["event"] for line in lines(tmp_path)] == ["start", "fit", "resumed", "fit"]
    assert lines(tmp_path)[-1]["loss"] == 2.0


def test_a_loop_of_links_is_replaced(tmp_path):
    (tmp_path / METRICS_FILE).symlink_to(tmp_path / METRICS_FILE)
    run(tmp_path, 1.0)
    assert len(lines(tmp_path)) == 2


def test_a_folder_of_its_name_is_one_clear_error(tmp_path):
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        run(tmp_path, 1.0)
