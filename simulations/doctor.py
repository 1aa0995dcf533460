"""What ``fedalign doctor`` checks."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from fedalign import __version__
from fedalign.errors import FedalignError
from fedalign.packages import PACKAGES, check_one_distribution
from fedalign.runfolder import data_directory
from simulations.scenario import packaged

REQUIRED = ("flwr", "torch", "transformers", "peft", "trl", "numpy", "scipy")


def diagnose() -> tuple[list[str], bool]:
    """Return one line for each check, and whether all that is required is there."""
    lines = [f"fedalign {__version__} in {Path(__file__).resolve().parent.parent}"]
    healthy = True
    try:
        check_one_distribution()
        lines.append(f"ok    packages {', '.join(PACKAGES)} come from one place")
    except FedalignError as error:
        healthy = False
        lines.append(f"FAIL  {error}")
    for name in REQUIRED:
        try:
            lines.append(f"ok    {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            healthy = False
            lines.append(f"FAIL  {name} is not installed; install fedalign again")
    try:
        lines.append(f"ok    ray {metadata.version('ray')} (Flower's simulation engine)")
    except metadata.PackageNotFoundError:
        lines.append("-     ray is not installed; only `--engine flower` and `flwr run` need it")
    try:
        from fedalign.models.packaged import pocket_folder

        lines.append(f"ok    pocket model in {pocket_folder()}")
    except (FedalignError, OSError) as error:
        healthy = False
        lines.append(f"FAIL  pocket model: {error}")
    lines.append(f"ok    scenarios: {', '.join(packaged()) or 'none packaged (a bundle)'}")
    lines.append(f"ok    run folders go to {data_directory() / 'runs'} unless run.out is set")
    return lines, healthy
