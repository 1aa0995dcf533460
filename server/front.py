"""The process that faces the network: gateway, enrollment and status page of one coordinator.

They share one process because they share the registry and the way to the SuperLink, and none of
them holds anything that is lost with it: the supervisor starts it again, and sites try again.  The
supervisor itself reads nothing from the network, so nothing from there can take it down.

``python -m server.front STATE``
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from fedalign.audit import AuditLog
from fedalign.errors import FedalignError
from server.connections import HEADER_BYTES, GuardedProtocol
from server.coordinator import Coordinator, load
from server.gateway import Gateway
from server.registry import Registry
from server.revoke import reconcile
from server.status_page import status_app
from server.superlink_admin import RunAdmin, connect

log = logging.getLogger("fedalign.server")
STOP_SECONDS = 3
RECONCILE_SECONDS = 60.0


async def serve(coordinator: Coordinator) -> None:
    """Serve until SIGTERM or SIGINT; raises when one of the servers cannot start or stops."""
    from server.enrollment import serve as serve_enrollment

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    audit = AuditLog(coordinator.audit)
    admin = connect(coordinator)
    with Registry(coordinator.registry) as registry:
        trust = ssl.create_default_context(cafile=str(coordinator.root))
        gateway = Gateway(
            f"https://{coordinator.superlink_address}",
            trust,
            lambda key: _status(registry, key),
            audit,
        )
        GuardedProtocol.refused = gateway.note
        servers = [_gateway_server(gateway, coordinator), _status_server(coordinator, admin)]
        joining = serve_enrollment(
            registry,
            admin,
            audit,
            host=coordinator.enrollment.host,
            port=coordinator.enrollment.port,
            chain=coordinator.chain.read_bytes(),
            key=coordinator.server_key.read_bytes(),
            ca=coordinator.root.read_bytes(),
            gateway=coordinator.gateway.public,
        )
        tasks = [asyncio.create_task(server.serve()) for server in servers]
        tasks.append(asyncio.create_task(_reconcile(registry, admin, audit)))
        ended = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                raise RuntimeError("a server stopped by itself")
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.to_thread(lambda: joining.stop(STOP_SECONDS).wait(STOP_SECONDS + 1))
            tasks[-1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ended.cancel()
            await gateway.close()


def _status(registry: Registry, key: bytes) -> str:
    site = registry.by_key(key)
    return "unknown" if site is None else site.status


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process has one, for all servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _gateway_server(gateway: ASGIApp, coordinator: Coordinator) -> _Server:
    return _Server(
        uvicorn.Config(
            gateway,
            host=coordinator.gateway.host,
            port=coordinator.gateway.port,
            ssl_certfile=str(coordinator.chain),
            ssl_keyfile=str(coordinator.server_key),
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=STOP_SECONDS,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,
            log_config=None,
        )
    )


def _status_server(coordinator: Coordinator, admin: RunAdmin) -> _Server:
    return _Server(
        uvicorn.Config(
            status_app(coordinator.state, nodes=admin.nodes, run_state=admin.run_state),
            host="127.0.0.1",
            port=coordinator.status.port,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=STOP_SECONDS,
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
        )
    )


async def _reconcile(registry: Registry, admin: RunAdmin, audit: AuditLog) -> None:
    """Tell Flower of revocations that it missed while it was down."""
    while True:
        try:
            await asyncio.to_thread(reconcile, registry, admin, audit)
        except FedalignError as error:
            log.info("revocations not compared yet: %s", error)
            await asyncio.sleep(2.0)
        else:
            await asyncio.sleep(RECONCILE_SECONDS)


def main() -> None:
    """Entry point of the child process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # It warns of every line that is not HTTP: a stranger could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    try:
        asyncio.run(serve(load(Path(sys.argv[1]))))
    except FedalignError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
