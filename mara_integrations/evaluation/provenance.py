"""Date, version, command and data of an evaluation or a training."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an evaluation comes from.

    Attributes:
        date: Day and time in UTC.
        version: Version of this package.
        command: The command line; empty where there was none.
        data: The data file; empty where there was none.
        data_fingerprint: Hash of the prompts; empty where there was none.
    """

    date: str
    version: str
    command: str = ""
    data: str = ""
    data_fingerprint: str = ""

    @classmethod
    def now(cls, command: str = "", data: str = "", data_fingerprint: str = "") -> Provenance:
        """Return the provenance of an evaluation that ends now."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        try:
            version = metadata.version("mara-integrations")
        except metadata.PackageNotFoundError:  # run from its sources
            version = "from sources"
        return cls(date, version, command, data, data_fingerprint)

    def line(self) -> str:
        """Return it in a line, without the command."""
        data = f" · {self.data} ({self.data_fingerprint[:12]})" if self.data else ""
        return f"{self.date} · mara_integrations {self.version}{data}"
