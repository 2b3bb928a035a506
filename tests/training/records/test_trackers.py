"""Where a run's figures go: the same events to every tracker."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from mara_integrations.training.records.metrics_log import MetricsLog
from mara_integrations.training.records.trackers import numbers

EVENTS = [
    ("fit", {"epoch": 0, "held_out_loss": 2.0}),
    ("fit", {"epoch": 1, "held_out_loss": 1.5}),
    ("rewards", {"stage": "base replies", "mean_reward": 0.25}),
    ("rewards", {"stage": "base replies", "mean_reward": 0.5}),
]


def track(name: str, folder: Path) -> None:
    """The run is interrupted in the middle, and has to repeat what it did just before."""
    for resumes, events in ((False, EVENTS[:3]), (True, EVENTS)):
        log = MetricsLog(folder)
        with suppress(KeyboardInterrupt), log.opened("f00d", [name, name], {"config": {"method": "value"}}):
            for event, values in events:
                log.log(event, values)
            if not resumes:
                raise KeyboardInterrupt


def test_numbers_are_found_within_objects_and_words_left_out():
    values = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}, "name": "x"}, "is_done": True, "list": [1], "none": None}
    assert numbers(values) == {"a": 1.0, "b.c": 2.5, "b.d.e": 3.0}


def test_tensorboard_gets_a_curve_of_each_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)

    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curves = {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert curves["fit/held_out_loss"] == [(0, 2.0), (1, 1.5)]
    assert curves["rewards/mean_reward"] == [(0, 0.25), (1, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_weights_and_biases_and_trackio_get_each_event_as_a_step(monkeypatch, tmp_path, name):
    heard = []
    module = ModuleType(name)
    module.init = lambda **given: heard.append(given)
    module.log = heard.append
    module.finish = lambda: heard.append("finished")
    monkeypatch.setitem(sys.modules, name, module)

    track(name, tmp_path / "brand-voice")

    figures = [given for given in heard if "project" not in given]
    assert figures == [
        {"fit/epoch": 0.0, "fit/held_out_loss": 2.0},
        {"fit/epoch": 1.0, "fit/held_out_loss": 1.5},
        {"rewards/mean_reward": 0.25},
        "finished",
        {"rewards/mean_reward": 0.5},
        "finished",
    ]
    first, second = ({**given} for given in heard if "project" in given)
    assert (first.pop("resume"), second.pop("resume")) == ("never", "allow")
    assert first == second and (("id" in first) is (name == "wandb"))
    assert first["name"] == "brand-voice" and first["config"] == {"method": "value"}


@pytest.mark.filterwarnings("ignore")  # of libraries that we do not choose
def test_the_real_trackio_goes_on_with_the_curves_of_an_interrupted_run(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="needs the trackio extra").SQLiteStorage

    track("trackio", tmp_path / "brand-voice")

    points = storage.get_logs("mara", "brand-voice")
    assert [point["step"] for point in points] == [0, 1, 2, 3]
    assert [point.get("fit/held_out_loss") for point in points] == [2.0, 1.5, None, None]
    assert [point.get("rewards/mean_reward") for point in points] == [None, None, 0.25, 0.5]


@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_goes_on_under_the_same_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    pytest.importorskip("wandb", reason="needs the wandb extra")

    track("wandb", tmp_path / "brand-voice")

    parts = [folder.name for folder in tmp_path.glob("wandb/offline-run-*")]
    run = json.loads((tmp_path / "brand-voice" / "metrics.jsonl").read_text().splitlines()[0])["run"]
    assert len(parts) == 2 and all(part.endswith(run) for part in parts)


def test_the_log_goes_on_after_what_an_interrupted_run_said(tmp_path):
    def run(*events, fingerprint="f00d", is_cut=False):
        log = MetricsLog(tmp_path)
        with log.opened(fingerprint, [], {"config": {}}):
            for event, values in events:
                log.log(event, values)
        text = (tmp_path / "metrics.jsonl").read_text()
        if is_cut:
            (tmp_path / "metrics.jsonl").write_text(text[:-9])  # killed while it wrote
        return [json.loads(line) for line in text.splitlines()]

    twice = ("parts", {"mean": 0.5})
    run(("fit", {"epoch": 0, "loss": 2.0}), twice, twice, ("fit", {"epoch": 1, "loss": 1.5}), is_cut=True)
    almost = {"epoch": 0, "loss": 2.0000001}
    lines = run(("fit", almost), twice, twice, twice, ("fit", {"epoch": 1, "loss": 1.5}), ("done", {}))
    said = [(line["event"], line.get("epoch")) for line in lines]
    parts = ("parts", None)
    assert said == [
        ("start", None), ("fit", 0), parts, parts, ("resumed", None), parts, ("fit", 1), ("done", None)
    ]  # fmt: skip
    times = [line["elapsed_s"] for line in lines]
    assert times == sorted(times)
    assert [line["event"] for line in run(twice)] == ["start", "parts"], "the other was done"
    assert [line["event"] for line in run(twice, fingerprint="beef")] == ["start", "parts"], "other settings"
