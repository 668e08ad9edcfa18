"""What the tests of the monitor and of its copy in W&B share."""

import json
from pathlib import Path
from typing import Any

from cluster.monitor_settings import MonitorSettings


def settings(**values: Any) -> MonitorSettings:
    """`[monitor]` without terminal and W&B, but for what is given."""
    return MonitorSettings.model_validate({"wandb": "disabled", "console": "off", **values})


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each of which must be whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]
