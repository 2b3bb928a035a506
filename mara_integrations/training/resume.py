"""Earlier work in the output folder: a finished head, or what an interrupted run has stored."""

from __future__ import annotations

from pathlib import Path

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.heads.folder import CONFIG_FILE
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import WORK_FOLDER
from mara_integrations.training.identity import IDENTITY_FILE, VERSION, Identity


def finished_head(config: TrainConfig, identity: Identity) -> MARAHead | None:
    """Return the finished head in the output folder, if it is the one that this run would train.

    Returns:
        The head. None if there is none, if it is to be overwritten, or if this run was interrupted after the head was
        first written.

    Raises:
        OutputError: If there is a head of another run, or one that can't be read, and it is not to be overwritten.
    """
    output = config.output
    if config.overwrite or not (output / CONFIG_FILE).exists():
        return None
    if any(not identity.differences(other) for other in _interrupted(output)):
        return None
    hint = "--overwrite replaces it; or name another folder"
    try:
        head = MARAHead.from_pretrained(output)
    except HeadError as error:
        raise OutputError(f"{str(output)!r} holds a head that can't be read: {error.message}", hint=hint) from None
    if not head.config.training or head.config.origin is None:
        raise OutputError(f"{str(output)!r} holds a head that something else made", hint=hint)
    recorded = Identity(head.config.training, head.config.origin.hashes)
    differences = [each for each in identity.differences(recorded) if VERSION not in each]
    if differences:
        raise OutputError(
            f"{str(output)!r} holds the finished head of another run: {'; '.join(differences)}", hint=hint
        )
    return head


def interrupted_differences(output: Path, identity: Identity) -> list[str]:
    """Return in words why the newest interrupted run in an output folder can't be continued.

    It is empty if there is none, or if one can be continued.
    """
    found = _interrupted(output)
    if not found or any(not identity.differences(other) for other in found):
        return []
    return identity.differences(found[0])


def _interrupted(output: Path) -> list[Identity]:
    """Return the identities of interrupted runs, the newest first."""
    files = sorted((output / WORK_FOLDER).glob(f"*/{IDENTITY_FILE}"), key=lambda file: file.stat().st_mtime_ns)
    return [identity for file in reversed(files) if (identity := Identity.read(file.parent)) is not None]
