"""Every private import of Flower, in one place (checked with flwr 1.41).

Flower's public modules (``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp``) are imported where
they are used.  What is here may move in any release: this is the file to look at when it does.
"""

from __future__ import annotations

import os

from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of every Flower process we start: no telemetry, no update check, no installs.

The last one lets Ray's actors see the GPU that the process itself would take; else ``model.device =
"auto"`` would mean another device in this runner than in the others.
"""


def quiet_flower() -> None:
    """Set :data:`QUIET_FLOWER` where the user has not decided otherwise."""
    for key, value in QUIET_FLOWER.items():
        os.environ.setdefault(key, value)


def become_flower_process(run_id: int = 1, node_id: int = 1, task_id: int = 1) -> None:
    """Give this process the identity without which ``flwr.app.Message`` cannot be made (1.38+)."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id


def node_info(node_id: int, name: str) -> NodeInfo:
    """Return what ``Grid.get_nodes()`` lists for one online node."""
    return NodeInfo(node_id=node_id, name=name, status="online")


__all__ = ["QUIET_FLOWER", "NodeInfo", "become_flower_process", "node_info", "quiet_flower"]
