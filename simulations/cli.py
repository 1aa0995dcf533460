"""``fedalign``, the researcher's command: simulate, compare, reproduce, report, export, doctor.

Exit codes: 0 success; 1 other errors; 2 settings; 3 data; 4 wire contract; 5 the run failed
(quorum, option mass); 6 the run folder cannot be resumed as asked.  Heavy imports happen inside the
commands, so that ``report`` and ``export`` load no torch.
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

from fedalign.config import Scalar  # noqa: E402
from fedalign.errors import ConfigError, FedalignError, ResumeError, RunFailed  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated alignment for groups that disagree: the researcher's command.",
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: section.key=value. May be repeated."),
]


@app.command()
def simulate(
    scenario: Annotated[
        str,
        typer.Argument(
            help="Packaged scenario, or the path of a TOML file. Without one: 'default', or "
            "'rewards' with --mode rewards."
        ),
    ] = "",
    settings: Set = None,
    mode: Annotated[
        str,
        typer.Option(
            help="'adapters': clients train, the server averages. 'rewards': the server trains a "
            "policy with PPO on the groups' rewards. Sets run.mode of a scenario that is named."
        ),
    ] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (new).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    engine: Annotated[
        str, typer.Option(help="'inprocess', or 'flower' (needs the extra ray).")
    ] = "inprocess",
    nodes: Annotated[int, typer.Option(min=1, help="Virtual nodes to deal clients over.")] = 1,
) -> None:
    """Run one federation on this machine, from private preferences to a fairness report."""
    from fedalign.config import from_flat, parse_override
    from simulations import scenario as scenarios

    if resume is not None:
        from fedalign.ledger import Ledger
        from fedalign.runfolder import LEDGER

        path = resume.expanduser().resolve()
        if not (path / LEDGER).exists():
            raise ResumeError(f"{path} holds no run to resume.")
        with Ledger(path / LEDGER, readonly=True) as ledger:
            stored = ledger.run().get("config")
        if stored is None:
            raise ResumeError(
                f"{path}: the run stopped before it began. Start it again; the folder can be used."
            )
        if seed is not None or out is not None or scenario or mode:
            raise ConfigError(
                "--resume goes on with a run as it was begun; leave out scenario, --mode, --seed "
                "and --out."
            )
        changed = dict(parse_override(text) for text in settings or ())
        config = from_flat(stored | changed | {"run.out": str(path), "run.resume": True})
    else:
        options: dict[str, Scalar] = {}
        if seed is not None:
            options["run.seed"] = seed
        if out is not None:
            options["run.out"] = str(out)
        if mode:
            options["run.mode"] = mode
        given = scenario or ("rewards" if mode == "rewards" else "default")
        config = scenarios.load(given, settings or (), options)

    from simulations.display import TerminalProgress
    from simulations.simulate import simulate as run
    from simulations.table import print_groups

    progress = TerminalProgress()
    try:
        outcome = run(config, progress, engine, nodes)
    except KeyboardInterrupt:
        folder = progress.folder or "the run folder"
        typer.echo(f"interrupted; go on with: fedalign simulate --resume {folder}", err=True)
        raise typer.Exit(130) from None
    print_groups(outcome.folder)
    typer.echo(f"report   {outcome.report}")
    typer.echo(f"adapter  {outcome.folder / 'adapter'}")
    if not outcome.option_mass_ok:
        raise RunFailed(
            f"option mass is {outcome.option_mass}, below score.min-option-mass: the model often "
            "does not answer, so the scores mean little."
        )


@app.command()
def compare(
    scenario: Annotated[str, typer.Argument(help="Packaged scenario, or a TOML file.")] = "default",
    rules: Annotated[
        str,
        typer.Option(
            help="Comma-separated rules: weight rules (usual: uniform,size,adaptive,placebo), or "
            "in mode rewards reward rules (usual: mean,reweighted,min,mean-over-n)."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N-1.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("comparison"),
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Also vary a setting: section.key=a|b|c. May be repeated."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="Arms that the others are compared with.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    settings: Set = None,
) -> None:
    """Run several rules over several seeds; paired differences with intervals. Resumable."""
    from simulations.compare import compare as run

    path = run(
        scenario,
        [r.strip() for r in rules.split(",") if r.strip()],
        seeds,
        out.expanduser().resolve(),
        settings or (),
        vary or (),
        baseline,
        workers,
    )
    typer.echo(f"comparison  {path}")


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder of runs and report.")],
    full: Annotated[bool, typer.Option("--full", help="All parts, not only core, oracle.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 3 on.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    parts: Annotated[str, typer.Option(help="Comma-separated parts, instead of --full.")] = "",
    countries: Annotated[
        Path | None,
        typer.Option(help="Folder with globalopinionqa/goqa.jsonl, for part countries."),
    ] = None,
    settings: Set = None,
) -> None:
    """Run the published comparison of reward rules with its controls. Resumable.

    Writes reproduction.md, .json and .svg. The default parts take about an hour on two cores.
    """
    from simulations.reproduce import reproduce as run
    from simulations.reproduce_parts import choose

    path = run(
        out.expanduser().resolve(),
        choose(parts, full),
        seeds,
        workers,
        settings or (),
        None if countries is None else countries.expanduser().resolve(),
    )
    typer.echo(f"reproduction  {path}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    references: Annotated[
        bool, typer.Option(help="Compute the attainable optimum from the run's data first.")
    ] = False,
) -> None:
    """Build report.html and summary.json of a run again, from its ledger alone."""
    from fedalign.report.html import build_report

    folder = folder.expanduser().resolve()
    if references:
        from simulations.references import add_references

        add_references(folder)
    typer.echo(f"report   {build_report(folder)}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Path, typer.Argument(help="Folder for the PEFT adapter.")],
) -> None:
    """Write the adapter of the last committed round in PEFT's layout, with its model card."""
    from server.export import export_run

    typer.echo(f"adapter  {export_run(folder.expanduser().resolve(), to.expanduser().resolve())}")


@app.command()
def doctor() -> None:
    """Check this installation: versions, the four packages, the pocket model, Ray."""
    from simulations.doctor import diagnose

    lines, healthy = diagnose()
    for line in lines:
        typer.echo(line)
    if not healthy:
        raise typer.Exit(1)


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
        typer.echo("interrupted; the run folder can be resumed", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
