"""Where a run's figures go: the same events to every tracker."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mara_integrations.errors import MissingExtraError
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.plan import make_plan
from mara_integrations.training.trackers import numbers, open_trackers

EVENTS = [
    ("fit", {"epoch": 0, "held_out_loss": 2.0}),
    ("fit", {"epoch": 1, "held_out_loss": 1.5}),
    ("rewards", {"stage": "base replies", "mean_reward": 0.25}),
    ("rewards", {"stage": "base replies", "mean_reward": 0.5}),
]


def track(name: str, folder: Path) -> None:
    (tracker,) = open_trackers([name, name], folder, {"method": "value"})
    for event, values in EVENTS:
        tracker.log(event, numbers(values))
    tracker.close()


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

    assert heard[0] == {"project": "mara", "name": "brand-voice", "config": {"method": "value"}}
    assert heard[1] == {"fit/epoch": 0.0, "fit/held_out_loss": 2.0}
    assert heard[4:] == [{"rewards/mean_reward": 0.5}, "finished"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_not_installed_is_named_before_the_work(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    config = TrainConfig.of(data="absent.jsonl", output=tmp_path / "out", track=[name])
    with pytest.raises(MissingExtraError, match=f"--track {name} needs {name}") as caught:
        make_plan(config)
    assert caught.value.hint == f"pip install 'mara-integrations[{name}]'"
