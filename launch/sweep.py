"""Runs a config once for every combination of some overrides, one after the other, and prints what each run ended with.

    python launch/sweep.py --config=configs/nano.py --workdir=runs/beta alignment.beta=0,0.005,0.1 seed=0,2

Each run has a folder of its own, named by its overrides; runs that have ended are not trained again. Run it in the
repository's folder, with the Python of the virtual environment that launch/setup.sh makes. `--print` prints one command
per run, to be handed to a scheduler, and runs nothing.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import subprocess
import sys


def combinations(overrides):
    """Every choice of one value per key: [{key: value}] from ["key=value,value", …]; ValueError names a bad one."""
    keys, values = [], []
    for override in overrides:
        key, equals, listed = override.partition("=")
        if not (key and equals and all(listed.split(","))):
            raise ValueError(f"an override reads key=value or key=value,value; found {override!r}")
        if key in keys:
            raise ValueError(f"{key} is given twice")
        keys.append(key)
        values.append(listed.split(","))
    return [dict(zip(keys, choice)) for choice in itertools.product(*values)]


def run_command(config, workdir, choice):
    """(folder, command line) of one run."""
    name = ",".join(f"{key}={value}" for key, value in choice.items()) or "base"
    folder = pathlib.Path(workdir) / name.replace("/", "_")
    command = [sys.executable, "-m", "melt_jax.train", f"--config={config}", f"--workdir={folder}"]
    return folder, command + [f"--config.{key}={value}" for key, value in choice.items()]


def main():
    """Runs or prints the sweep; the exit status counts the runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value,value,…")
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--workdir", required=True, help="a folder for the runs' folders")
    parser.add_argument("--print", action="store_true", help="print the commands instead of running them")
    args = parser.parse_args()

    try:
        choices = combinations(args.overrides)
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    runs = [run_command(args.config, args.workdir, choice) for choice in choices]
    for folder, command in runs:
        print(shlex.join(command), flush=True)
        if not args.print and subprocess.run(command).returncode:
            failed += 1
            print(f"failed: {folder}", flush=True)
    for folder, _ in () if args.print else runs:
        results = folder / "results.json"
        if results.exists():
            print(folder.name, json.dumps(json.loads(results.read_text())))
    return failed


if __name__ == "__main__":
    sys.exit(main())
