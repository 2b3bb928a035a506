"""The settings of a training run, put together of `training.settings`.

Torch-free: a command line checks them before anything heavy is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mara_integrations.models.options import read_yaml_settings
from mara_integrations.training.settings.data import DataSettings
from mara_integrations.training.settings.head import HeadSettings
from mara_integrations.training.settings.identity_mark import OutsideIdentity
from mara_integrations.training.settings.main import MainSettings
from mara_integrations.training.settings.methods import Contrast, MethodSettings
from mara_integrations.training.settings.placement import PlacementSettings
from mara_integrations.training.settings.replies import ReplySettings
from mara_integrations.training.settings.rewards import RewardSettings


# pydantic orders the fields from the last class to the first
class TrainConfig(
    PlacementSettings, MethodSettings, HeadSettings, ReplySettings, RewardSettings, DataSettings, MainSettings
):
    """Settings of one training run, by the names of the options of `mara-tools train`."""

    @property
    def principle_contrast(self) -> Contrast:
        """`contrast`, or what stands for it where it is not given."""
        return self.contrast or ("neutral" if self.against is None else "both")

    def described(self) -> dict[str, Any]:
        """Return the settings that decide the head, as JSON values; without paths of this machine."""
        fields = type(self).model_fields.items()
        outside = {name for name, field in fields if OutsideIdentity() in field.metadata}
        return self.model_dump(mode="json", exclude=outside)

    def to_yaml(self) -> str:
        """Return the settings in the form that `--config` reads; `overwrite` is not to be repeated unasked."""
        settings = self.model_dump(mode="json", exclude={"overwrite"})
        return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


# Names of settings by group, in the order that `--help` shows them.
GROUPS: dict[str, tuple[str, ...]] = {
    title: tuple(settings.model_fields)
    for title, settings in (
        ("Model, data and goal", MainSettings),
        ("Data", DataSettings),
        ("Rewards", RewardSettings),
        ("Replies", ReplySettings),
        ("Head and fit", HeadSettings),
        ("Single methods", MethodSettings),
        ("Where it runs", PlacementSettings),
    )
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file, by the names of `TrainConfig` or by those of the options.

    Raises:
        ConfigError: If the file can't be read, or has a name that is not a setting.
    """
    return read_yaml_settings(path, TrainConfig.model_fields, "train")
