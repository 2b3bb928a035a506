"""Sends the metrics of a run to TensorBoard, Weights & Biases or Trackio, event by event as metrics.jsonl gets them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from mara_integrations.errors import MissingExtraError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "mara"  # project of the runs, in trackers that have projects
_STEPS = ("epoch", "round", "step", "update")  # values that number an event


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """Log the numbers of an event by name; `count` is how often the event was logged before."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Writes curves into a folder; the step is the number that an event has, or else how often it came before."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resumes: bool) -> None:
        writer = _extra("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))
        if not resumes:
            self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """Add a point to the curve of each number."""
        step = int(next((values[name] for name in _STEPS if name in values), count))
        for name, value in values.items():
            self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Wandb:
    """Logs to Weights & Biases, or to Trackio, which has the same interface; both have settings of their own."""

    def __init__(self, module: str, folder: Path, settings: Mapping[str, Any], *, run: str, resumes: bool) -> None:
        self._module = _extra(module, module)
        which = {"id": run} if module == "wandb" else {}  # Trackio continues the last run of that name
        self._module.init(
            project=PROJECT, name=folder.name, config=dict(settings), resume="allow" if resumes else "never", **which
        )

    def log(self, event: str, values: Mapping[str, float], count: int) -> None:
        """Log all the numbers as one step."""
        self._module.log({f"{event}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """End the run."""
        self._module.finish()


def open_trackers(
    names: Sequence[TrackerName], folder: Path, settings: Mapping[str, Any], *, run: str, resumes: bool = False
) -> tuple[Tracker, ...]:
    """Open the trackers of a run; a name that is given twice counts once.

    Args:
        names: Names of the trackers.
        folder: Folder of the head; its name is the run's.
        settings: Settings to show with the run.
        run: Id of the run, which no other run has.
        resumes: Whether to continue the curves of that run.

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
    """Return the numbers of an event by name; names within objects are joined with dots."""
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
