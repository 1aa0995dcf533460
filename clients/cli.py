"""``fedalign-client``, a site's command: join, policy, check, start, status, renew.

Exit codes: 0 success; 1 other errors; 2 settings; 3 data; 4 wire contract.  Heavy imports happen
inside the commands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

# One thread a process: small matrices run slower on many, and results stay bit-equal.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer  # noqa: E402

from fedalign.errors import FedalignError  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated alignment with private preferences that stay here: a site's command.",
)

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder of the site; else the user's data folder.")
]
TrainerUser = Annotated[
    str, typer.Option(help="User (name or number) of the trainer and the data; needs root.")
]
NodeUser = Annotated[str, typer.Option(help="User (name or number) that Flower's node runs as.")]


def _version(wanted: bool) -> None:
    if wanted:
        from fedalign import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the release.")
    ] = False,
) -> None:
    """Hold the options that belong to no command."""


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help="The invite, as the operator gave it.")],
    home: HomeOption = None,
) -> None:
    """Enrol this site with an invite: make a key, register it, keep the coordinator's CA."""
    from clients.join import join as run

    folder = _home(home)
    joined = run(invite, folder, typer.echo)
    _write_policy(folder)
    trainer = folder / "trainer"
    typer.echo(f"site {joined.site}, group {joined.group}, key {joined.fingerprint[:16]}")
    typer.echo(f"next: write in {trainer / 'trainer.toml'} where your data are, such as")
    typer.echo('  [data]\n  source = "survey"\n  path = "/srv/fedalign/preferences.jsonl"')
    typer.echo(f"and in {trainer / 'policy.toml'} what you allow; then")
    where = f" --home {folder}" if home else ""
    typer.echo(f"  fedalign-client check{where}\n  fedalign-client start{where}")


@app.command()
def renew(home: HomeOption = None) -> None:
    """Replace this site's key by a new one, vouched for by the old."""
    from clients.join import renew as run

    run(_home(home), typer.echo)


@app.command()
def policy(home: HomeOption = None) -> None:
    """Write policy.toml with the defaults, every field explained, unless there is one; print it."""
    folder = _home(home)
    path = _write_policy(folder)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"# {path}")


@app.command()
def check(
    data: Annotated[
        str, typer.Argument(help="File or folder to check in place of that in trainer.toml.")
    ] = "",
    source: Annotated[str, typer.Option(help="Kind of these data; else as in trainer.toml.")] = "",
    home: HomeOption = None,
    trainer_user: TrainerUser = "",
    node_user: NodeUser = "",
    seed: Annotated[int, typer.Option(help="Seed of the split that is counted.")] = 0,
) -> None:
    """Check data, policy and separation; print what would leave. Sends nothing."""
    from clients.check import check as run
    from clients.site import Home

    found = run(Home(_home(home)), data, source, node_user, trainer_user, seed)
    for line in found.lines:
        typer.echo(line)
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def start(
    home: HomeOption = None,
    only: Annotated[str, typer.Option(help="'trainer' or 'supernode'; else both.")] = "",
    trainer_user: TrainerUser = "",
    node_user: NodeUser = "",
) -> None:
    """Run the trainer and Flower's node, each as its own user, until stopped."""
    from clients.site import Home
    from clients.start import start as run

    run(Home(_home(home)), only, trainer_user, node_user)


@app.command()
def status(
    home: HomeOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Entries of the audit log to show.")] = 10,
) -> None:
    """Say what runs, what the policy allows, what was asked lately, what is left of today."""
    from clients.site import Home
    from clients.status import status as run

    for line in run(Home(_home(home)), jobs):
        typer.echo(line)


def _home(given: Path | None) -> Path:
    from clients.site import default_home

    return (given or default_home()).expanduser().resolve()


def _write_policy(folder: Path) -> Path:
    """Write the default policy where there is none; return its path."""
    from clients.node_files import write
    from clients.policy_toml import template

    path = folder / "trainer" / "policy.toml"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(path, template().encode(), 0o600)
    return path


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
