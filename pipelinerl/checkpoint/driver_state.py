"""What the driver has to remember besides the trainer's state: `driver.json` of a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelinerl.errors import DataError

DRIVER = "driver.json"


@dataclass(frozen=True, slots=True)
class DriverState:
    """As of the end of optimizer step `step`."""

    step: int
    ledger: Mapping[str, Any]  # rollout/ledger.py
    elapsed_s: float  # of the whole run, earlier lives included
    generated_tokens: int = 0
    dropped_in_a_row: Mapping[str, int] = field(default_factory=dict)  # by reason
    skipped_in_a_row: int = 0
    reported_drops: Mapping[str, int] = field(default_factory=dict)  # those that the metrics have
    wandb_id: str = ""

    def write(self, folder: Path) -> Path:
        path = folder / DRIVER
        path.write_text(json.dumps(asdict(self)) + "\n")
        return path

    @classmethod
    def read(cls, folder: Path) -> "DriverState":
        """Raises DataError when it is of another version of this class."""
        try:
            return cls(**json.loads((folder / DRIVER).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: {DRIVER} cannot be read: {error}") from error
