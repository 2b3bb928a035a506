"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. Fed from the same events."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from mara_integrations.errors import MissingExtraError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "mara"  # that runs are filed under, where a tracker has projects
_STEPS = ("epoch", "round", "step", "update")  # by which an event numbers itself


class Tracker(Protocol):
    """Receives the figures of a run."""

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """One event's numbers by name, and how often it came before."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Curves in a folder, a step for each time an event comes, or as the event numbers itself."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resumes: bool) -> None:
        writer = _extra("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))
        if not resumes:
            self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """A point on the curve of each number."""
        step = int(next((values[name] for name in _STEPS if name in values), count))
        for name, value in values.items():
            self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """Weights & Biases, or Trackio, which has the same interface; where and as whom is for its own settings to say."""

    def __init__(self, module: str, folder: Path, settings: Mapping[str, Any], *, run: str, resumes: bool) -> None:
        self._module = _extra(module, module)
        which = {"id": run} if module == "wandb" else {}  # Trackio goes on with the last run of a name
        self._module.init(
            project=PROJECT, name=folder.name, config=dict(settings), resume="allow" if resumes else "never", **which
        )

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """One step with all the numbers."""
        self._module.log({f"{event}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """End the run."""
        self._module.finish()


def open_trackers(
    names: Sequence[TrackerName], folder: Path, settings: Mapping[str, Any], *, run: str, resumes: bool = False
) -> tuple[Tracker, ...]:
    """The trackers of a run, each name once.

    Args:
        names: Which.
        folder: Of the head; its name is the run's.
        settings: Shown with the run.
        run: No other run has it.
        resumes: Go on with the curves of that run.

    Raises:
        MissingExtraError: If one is not installed; names the extra.
    """
    assert set(names) <= set(get_args(TrackerName))
    return tuple(
        TensorBoard(folder, settings, resumes=resumes)
        if name == "tensorboard"
        else Wandb(name, folder, settings, run=run, resumes=resumes)
        for name in dict.fromkeys(names)
    )


def check_installed(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        MissingExtraError: If one is not; names the extra.
    """
    for name in names:
        _extra("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of an event, those within objects by names joined with dots."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def _extra(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"--track {name} needs {name}", hint=f"pip install 'mara-integrations[{name}]'"
        ) from error
