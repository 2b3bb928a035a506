"""What a run needs and is not installed is named at once: before data is read, a reward imported or a model loaded."""

from __future__ import annotations

import sys

import pytest

from mara_integrations.errors import MissingExtraError
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.run import train


@pytest.fixture(autouse=True)
def nothing_costly(monkeypatch):
    for name in ("run.load_model", "run.read_outline", "inputs.read_dataset", "inputs.parse_reward"):
        monkeypatch.setattr(f"mara_integrations.training.{name}", lambda *_, name=name, **__: pytest.fail(name))


@pytest.mark.parametrize("do", [train, dry_run])
@pytest.mark.parametrize(
    ("setting", "extra"),
    [({"ray": 2}, "ray"), *(({"track": [name]}, name) for name in ("tensorboard", "wandb", "trackio"))],
    ids=["ray", "tensorboard", "wandb", "trackio"],
)
def test_an_extra_that_is_absent_is_named_first(monkeypatch, tmp_path, do, setting, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    config = TrainConfig.of(data="absent.jsonl", reward="absent:judge", output=tmp_path / "head", **setting)

    with pytest.raises(ImportError, match=rf"^--(track )?{extra} needs {extra}") as caught:
        do(config)

    assert isinstance(caught.value, MissingExtraError)
    assert caught.value.hint == f"pip install 'mara-integrations[{extra}]'"
    assert not (tmp_path / "head").exists()
