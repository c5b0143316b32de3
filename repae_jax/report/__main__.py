"""Writes a page about runs: `python -m repae_jax.report runs/repae [runs/other …]`.

Writes one HTML file that opens from disk, without network, of less than 10 MB: curves, samples and reconstructions over
training time, evaluations, latent analysis, configs and their differences, cost. Parts that a run does not have yet are left
out, and files that cannot be read are named, so it works while the run goes on, and on a machine that has no accelerator. Of a
run of two phases, both are on one page.
"""

import time

from etils import epath

from repae_jax import cli
from repae_jax.evaluation.short_names import short_names
from repae_jax.files import write_all
from repae_jax.report.page import MARKER, make_page
from repae_jax.report.run_folder import read_run
from repae_jax.training.phases import phases_of


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(prog="python -m repae_jax.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("workdirs", nargs="+", type=cli.path, metavar="WORKDIR", help="folder of a run; several are compared")
    place = "the page; default report.html in the folder of a single run, comparison.html in that of the first"
    parser.add_argument("--out", type=cli.path, help=place)
    return parser.parse_args(argv)


def in_phases(workdirs):
    """Returns the folders with those of a run of two phases in the place of its own."""
    return [str(folder) for workdir in workdirs for folder in phases_of(workdir) or [workdir]]


def names_of(workdirs):
    """Returns short names of the runs that tell them apart."""
    paths = [str(epath.Path(workdir).expanduser().absolute()) for workdir in workdirs]
    if repeated := sorted({str(workdir) for workdir, path in zip(workdirs, paths) if paths.count(path) > 1}):
        raise ValueError(f"{', '.join(repeated)} is given more than once; give every run once")
    names = short_names(paths)
    return [names[path] for path in paths]


def two_phases(workdir, runs):
    """Returns the heading of a page on one run of two phases, with what both have cost so far."""
    costs = [run["cost"] for run in runs]
    steps = " + ".join(f"{cost.get('step', 0):,}" for cost in costs)
    hours = sum(cost.get("device_hours", 0) for cost in costs)
    return f"{epath.Path(workdir).name}, a run of two phases: {steps} steps, {hours:,.1f} device hours"


def check_out(out):
    """Raises ValueError if the page would replace a file that is not a report, FileNotFoundError if it has no folder."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} does not exist; make the folder first, or give another --out")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file in --out")
    if out.exists():
        with out.open("rb") as file:
            if MARKER.encode() not in file.read(1000):
                raise ValueError(f"{out} exists and is not a report; choose another --out, or move it away")


def run(args):
    """Writes the page as the command line says; returns its path."""
    folders = in_phases(args.workdirs)
    names, is_one = names_of(folders), len(args.workdirs) == 1
    default = epath.Path(args.workdirs[0]) / ("report.html" if is_one else "comparison.html")
    out, now = epath.Path(args.out or default), time.time()
    runs = [read_run(folder, name, now) for folder, name in zip(folders, names)]
    check_out(out)
    page = make_page(runs, now, two_phases(args.workdirs[0], runs) if is_one and folders != args.workdirs else "")
    write_all({out: lambda temporary: temporary.write_text(page, encoding="utf-8")}, overwrite=True)
    return out


@cli.command(parse_args)
def main(args):
    """Entry point."""
    print(f"report: {run(args)}")


if __name__ == "__main__":
    main()
