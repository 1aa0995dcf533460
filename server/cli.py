"""``fedalign-server``, the operator's command: one coordinator, its sites, its runs.

Exit codes: 0 success; 1 other errors; 2 settings, or no coordinator in the folder; 3 data; 4 wire
contract; 5 the run failed; 6 the run cannot be resumed as asked; 130 interrupted.  Heavy imports
happen inside the commands.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# One thread a process: small matrices run slower on many, and results stay bit-equal.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer  # noqa: E402

from fedalign.errors import ConfigError, FedalignError  # noqa: E402

if TYPE_CHECKING:
    from fedalign.config import Config
    from server.coordinator import Coordinator

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The coordinator of a federation: the operator's command.",
)

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="FEDALIGN_STATE",
        help="Folder of the coordinator. Default: fedalign/coordinator in the user's data folder.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: section.key=value. May be repeated."),
]
UNITS = {"m": 60, "h": 3600, "d": 86400}
LONGEST = 90 * 86400


@app.command()
def init(
    host: Annotated[
        str,
        typer.Option(
            help="Names or IP addresses by which sites reach this machine, comma-separated. Sites "
            "are told the first."
        ),
    ],
    state: State = None,
    port: Annotated[int, typer.Option(help="First of the four ports that are used.")] = 9443,
) -> None:
    """Make a new coordinator: its folder, certificates, secrets and settings."""
    from server.coordinator import default_state
    from server.coordinator import init as make

    coordinator = make(state or default_state(), _words(host), port)
    typer.echo(f"coordinator  {coordinator.state}")
    typer.echo(f"settings     {coordinator.state / 'coordinator.toml'}")
    typer.echo(
        f"keep {coordinator.root_key} secret, and a copy of the whole folder: who has it can pose "
        "as this coordinator."
    )
    typer.echo("next: fedalign-server start")


@app.command("renew-certificate")
def renew_certificate(
    host: Annotated[
        str, typer.Option(help="Names or addresses, comma-separated. Default: those it has.")
    ] = "",
    state: State = None,
) -> None:
    """Issue a new server certificate under the same authority. Sites need nothing."""
    from server.coordinator import renew_certificate as renew
    from server.superlink import running

    coordinator = _load(state)
    names = renew(coordinator, _words(host))
    typer.echo(f"new certificate for {', '.join(names)}: {coordinator.server_certificate}")
    if running(coordinator):
        typer.echo("the coordinator uses the old one until you start it again")


@app.command()
def start(state: State = None) -> None:
    """Run the coordinator in the foreground until Ctrl-C or SIGTERM."""
    import logging

    from server.superlink import start as run_forever

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    run_forever(_load(state).state, lambda line: print(line, flush=True))


@app.command()
def invite(
    site: Annotated[str, typer.Option(help="Name of the site: small letters, digits, hyphens.")],
    group: Annotated[str, typer.Option(help="Group whose preferences the site holds.")],
    expires: Annotated[str, typer.Option(help="How long it is good for: 30m, 12h or 7d.")] = "7d",
    state: State = None,
) -> None:
    """Print an invite for one site, alone on standard output. It is a secret."""
    from fedalign.audit import AuditLog
    from fedalign.enrollment.invite import make_invite
    from fedalign.enrollment.names import check_group, check_site
    from server.ca import fingerprint
    from server.registry import Registry

    coordinator = _load(state)
    lifetime = parse_lifetime(expires)
    check_site(site)
    check_group(group)
    now = time.time()
    with Registry(coordinator.registry) as registry:
        token = registry.invite(site, group, lifetime, now)
    authority = fingerprint(coordinator.root.read_bytes())
    made = make_invite(coordinator.enrollment.public, token, authority)
    AuditLog(coordinator.audit).append("invite.made", site=site, group=group, seconds=int(lifetime))
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now + lifetime))
    typer.echo(
        f"Invite for site '{site}' in group '{group}', good for one join until {until}.\n"
        "Who holds it can join as this site: send it over a private channel. The site runs:\n"
        "  fedalign-client join 'INVITE'",
        err=True,
    )
    typer.echo(made.line())


@app.command()
def sites(state: State = None) -> None:
    """List sites with key, status and when each was last seen, and open invites."""
    from rich.console import Console
    from rich.table import Table

    from server.registry import Registry
    from server.status_words import ago, clock
    from server.superlink_admin import AdminUnavailable, connect

    coordinator = _load(state)
    with Registry(coordinator.registry, readonly=True) as registry:
        keys, invites = registry.sites(), registry.invites()
    now = time.time()
    try:
        nodes = {node.node_id: node for node in connect(coordinator).nodes()}
    except AdminUnavailable:
        nodes = None
        typer.echo("the coordinator does not run, so nobody knows who is online", err=True)
    table = Table("site", "group", "key", "status", "last seen", "enrolled")
    for key in sorted(keys, key=lambda k: (k.site, k.enrolled_at)):
        node = None if nodes is None or key.node_id is None else nodes.get(key.node_id)
        status, seen = key.status, "–"
        if node is not None and key.status == "active":
            status = node.status
            seen = "now" if node.status == "online" else ago(node.last_seen, now)
        table.add_row(
            key.site, key.group, key.fingerprint[:16], status, seen, clock(key.enrolled_at)
        )
    console = Console()
    console.print(table if keys else "no site has joined yet")
    for open_ in invites:
        if open_.expires_at > now:
            console.print(
                f"invited: {open_.site} ({open_.group}), until {clock(open_.expires_at)}",
                highlight=False,
            )


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Name of the site.")], state: State = None
) -> None:
    """Take a site out, at once and for good: its keys and its open invites."""
    from fedalign.audit import AuditLog
    from server.registry import Registry
    from server.revoke import revoke as take_out
    from server.superlink_admin import connect

    coordinator = _load(state)
    with Registry(coordinator.registry) as registry:
        done = take_out(registry, connect(coordinator), AuditLog(coordinator.audit), site)
    typer.echo(f"'{site}' is out: {done.keys} key(s) ended, its open invites are void")
    if not done.flower_knows:
        typer.echo("the coordinator does not run; Flower is told when it starts", err=True)
    typer.echo(f"to let it in again: fedalign-server invite --site {site} --group GROUP", err=True)


@app.command()
def run(
    scenario: Annotated[
        str, typer.Option(help="Packaged scenario, or the path of a TOML file.")
    ] = "default",
    settings: Set = None,
    name: Annotated[
        str, typer.Option(help="Name of the run. Default: the scenario's, with the time.")
    ] = "",
    state: State = None,
) -> None:
    """Run one federation over the enrolled sites, to its end. Ctrl-C stops it."""
    from server.submit import new_run
    from server.submit import settings as read_settings

    coordinator = _started(state)
    flat = read_settings(scenario, settings or ())
    name = name or f"{flat['run.name']!s:.16}-{time.strftime('%Y%m%d-%H%M%S')}"
    _submit(coordinator, new_run(coordinator, flat, name), name)


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="Name of the run.")],
    settings: Set = None,
    state: State = None,
) -> None:
    """Go on with a run that failed or was stopped, to its end. Ctrl-C stops it."""
    from server.submit import old_run

    coordinator = _started(state)
    _submit(coordinator, old_run(coordinator, name, settings or ()), name)


@app.command()
def status(state: State = None) -> None:
    """Show the state of coordinator, sites and runs, and what needs attention first."""
    from rich.console import Console

    from server.status import facts, print_status
    from server.superlink import running
    from server.superlink_admin import connect

    coordinator = _load(state)
    if running(coordinator):
        admin = connect(coordinator)
        found = facts(coordinator.state, nodes=admin.nodes, run_state=admin.run_state)
    else:
        found = facts(coordinator.state)
    print_status(found, Console())


def _submit(coordinator: Coordinator, config: Config, name: str) -> None:
    from server.follow import Watcher, follow
    from server.submit import submit
    from server.superlink_admin import connect

    admin = connect(coordinator)
    watcher = Watcher(coordinator.runs / name)
    submission = submit(coordinator, admin, config, name)
    typer.echo(f"run '{name}' ({submission.run_id}): {coordinator.runs / name}")
    typer.echo("Flower starts the ServerApp, which asks the sites: this takes half a minute")
    report = follow(coordinator, admin, submission, watcher, typer.echo)
    typer.echo(f"report   {report}")
    typer.echo(f"adapter  {report.parent / 'adapter'}")


def parse_lifetime(text: str) -> float:
    """Return the seconds of ``30m``, ``12h`` or ``7d``; ``ConfigError`` for anything else."""
    number, unit = text[:-1], text[-1:]
    seconds = int(number) * UNITS[unit] if number.isdecimal() and unit in UNITS else 0
    if not 0 < seconds <= LONGEST:
        raise ConfigError(
            f"--expires {text}: write minutes, hours or days, such as 30m, 12h or 7d, up to 90d."
        )
    return float(seconds)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _load(state: Path | None) -> Coordinator:
    from server.coordinator import default_state, load

    return load(state or default_state())


def _started(state: Path | None) -> Coordinator:
    """Return a coordinator that runs; ``ConfigError`` when it does not."""
    from server.superlink import running

    coordinator = _load(state)
    if not running(coordinator):
        raise ConfigError(
            f"the coordinator of {coordinator.state} does not run. Start it in another terminal, "
            "or as a service: fedalign-server start"
        )
    return coordinator


def main() -> None:
    """Entry point: checks the packages, turns errors into messages and exit codes."""
    try:
        from fedalign.packages import check_one_distribution

        check_one_distribution()
        app()
    except FedalignError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
