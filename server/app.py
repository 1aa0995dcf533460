"""The Flower ServerApp.  The same app runs in process, in Flower's simulation and deployed.

Settings come from Flower's run-config (``[tool.flwr.app.config]`` and ``--run-config``), or, when a
command builds the app itself, from the configuration handed to :func:`make_app`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedalign.config import Config, from_flat
from fedalign.errors import RunFailed
from fedalign.packages import check_installed_version
from fedalign.runfolder import prepare
from server.places import located
from server.progress import LogProgress, Progress
from server.run import Outcome, execute

log = logging.getLogger("fedalign.server")


def make_app(
    config: Config | None = None,
    progress: Progress | None = None,
    done: Callable[[Outcome], None] | None = None,
) -> ServerApp:
    """Return a ServerApp; without ``config`` it reads Flower's run-config."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        check_installed_version()
        if config is None:
            _log_to_stream()
        settings = config or prepare(from_flat(located(context.run_config, os.environ)))
        # A deployed grid is asked over HTTP, and rounds there take seconds.
        poll = 0.5 if settings.deployment.registry else 0.05
        outcome = execute(grid, settings, progress or LogProgress(), poll)
        if done is not None:
            done(outcome)
        log.info("report: %s", outcome.report)
        if not outcome.option_mass_ok:
            # Raising is the only way to make Flower mark the run as failed.
            raise RunFailed(
                f"option mass is {outcome.option_mass}, below score.min-option-mass: the model "
                f"often does not answer, so its scores mean little. See {outcome.report}."
            )

    return server_app


def _log_to_stream() -> None:
    """Print our log lines: Flower streams what the app prints and handles its own loggers only."""
    logger = logging.getLogger("fedalign")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("fedalign: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


app = make_app()
