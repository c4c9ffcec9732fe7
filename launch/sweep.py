"""Trains a recipe once for every combination of some overrides, one run after another, and prints the results.

    python launch/sweep.py --config=configs/nano.py --workdir=runs/beta --config.evaluation.baselines=False \
        alignment.beta=0,0.005,0.1 seed=0,1,2

Each run has its own folder, named after its overrides. All combinations are checked before the first run starts. Rerun
the command to resume the sweep; complete runs are not trained again. `--config.KEY=VALUE` overrides a key in all runs.
A value that contains commas stands in brackets: "phases=('transition',),('transition','alignment')". The command ends
with a table of the models after each phase; `results.json` in a run's folder has the scores of each loop, too.
`--print` prints one command per run, for a scheduler, and trains nothing. The exit status is 1 if a run failed. Run it
in the repository's folder with the Python of the virtual environment that launch/setup.sh creates.
"""

import itertools
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

from melt_jax import command_line
from melt_jax.config import InputError, freeze
from melt_jax.files import Path, as_path, read_json
from melt_jax.inference.results import table

Overrides = list[tuple[str, str]]


def combinations(swept: Sequence[str]) -> list[Overrides]:
    """Every combination, as [(key, value), …], of one value per key from ["key=value,value", …].

    Raises:
      InputError: an argument has another form or a key occurs twice.
    """
    keys, values = [], []
    for argument in swept:
        key, _, listed = argument.partition("=")
        found = re.split(r",(?![^(\[]*[)\]])", listed)  # at commas outside brackets
        if not (key and all(found)):
            raise InputError(f"overrides: expected key=value or key=value,value, found {argument!r}")
        if key in keys:
            raise InputError(f"overrides: expected each key once, found {key} twice")
        keys.append(key)
        values.append(found)
    return [list(zip(keys, choice)) for choice in itertools.product(*values)]


def run_name(choice: Overrides) -> str:
    """The name of a run's folder."""
    return ",".join(f"{key}={value}" for key, value in choice).replace("/", "_") or "base"


def run_command(config: str, folder: Path, overrides: Overrides) -> list[str]:
    """The command that trains one run."""
    command = [sys.executable, "-m", "melt_jax.train", f"--config={config}", f"--workdir={folder}"]
    return command + [f"--config.{key}={value}" for key, value in overrides]


def check_choices(config: str, choices: Sequence[Overrides], fixed: Overrides) -> None:
    """Checks the config of every run; `fixed` are the overrides of all runs.

    Raises:
      InputError: the errors of the first run whose config has any.
    """
    for choice in choices:
        try:
            freeze(command_line.load_config(config, fixed + choice))
        except InputError as error:
            raise InputError(f"{run_name(choice)}: {error}") from error


def sweep(commands: dict[Path, list[str]]) -> int:
    """Runs {folder: command} in order, prints the results, and returns the number of runs that failed."""
    failed = 0
    for folder, command in commands.items():
        print(shlex.join(command), flush=True)
        if status := subprocess.run(command).returncode:
            failed += 1
            print(f"failed with status {status}: {folder}", flush=True)
    rows = {}
    for folder in commands:
        results = folder / "results.json"
        measured = read_json(results) if results.exists() else {}
        rows |= {f"{folder.name}, {name}": row for name, row in measured.items() if name.startswith("after ")}
    if rows:
        print(table(rows))
    return failed


def define_flags() -> None:
    """Defines the flags of this command."""
    command_line.define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the runs' folders.", required=True)
    flags.DEFINE_bool("print", False, "Print the commands instead of running them.")


def main(argv: list[str]) -> None:
    """Runs or prints the sweep over the overrides in `argv[1:]`."""
    options, fixed = flags.FLAGS, command_line.config_overrides()
    choices = combinations(argv[1:])
    check_choices(options.config, choices, fixed)
    folders = [as_path(options.workdir, "--workdir") / run_name(choice) for choice in choices]
    commands = {folder: run_command(options.config, folder, fixed + choice) for folder, choice in zip(folders, choices)}
    if options["print"].value:
        print(*map(shlex.join, commands.values()), sep="\n")
    elif sweep(commands):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, positional=True)
