"""Damages each file of the newest checkpoint; runs must continue from a sound one, bitwise. Not in the test suite.

    python -m tests.long.damage [--processes=2] [--every=3]

Takes a run of one phase that was killed after its last checkpoint and before its model was published. Truncates,
empties, removes, or flips one bit of, each file of the newest checkpoint in turn and runs the command again. It must
name the folder, the file and what is wrong with it, keep the folder apart, continue from the checkpoint before, and end
with the model and the checkpoint of an undisturbed run, bitwise. Files that only mark a checkpoint in a bucket, and the
record itself, which older checkpoints lack, may also be missed: then the run continues from the newest checkpoint.
"""

import argparse
import pathlib
import re
import shutil
import sys
from collections.abc import Callable

from melt_jax.digests import DIGESTS
from melt_jax.training.checkpoints import DAMAGED, ITEM
from tests.helpers.run_commands import kill
from tests.helpers.runs import PHASES, contents, differing, log_of, prepare, start
from tests.helpers.trial import Trial, print_trials
from tests.long.kill_and_resume import PATIENCE, run_to_end, wait_for

PHASE = "alignment"
CHANGES = {"phases": PHASE, "evaluation__sequences": 0}


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "one bit flipped": _flip,
    "removed": lambda data: None,
}


def damage_each_file(folder: pathlib.Path, processes: int = 1, every: int = 1, case: str = "") -> Trial:
    """The trial of the module, in a folder with `teacher`; tries every n-th case whose name matches `case`."""
    trial = Trial(f"damaged checkpoint, {processes} process{'es' * (processes > 1)}")
    undisturbed, killed = folder / f"complete{processes}", folder / f"killed{processes}"
    for path in (undisturbed, killed):
        shutil.rmtree(path, ignore_errors=True)
    run_to_end(undisturbed, processes, **CHANGES)
    phases = {PHASE: PHASES[PHASE]}
    wanted = contents(undisturbed, phases)
    shutil.copytree(undisturbed, killed)
    shutil.rmtree(killed / PHASE / "model")
    newest = killed / PHASE / "checkpoints" / str(PHASES[PHASE])
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    cases = [(name, how) for name in files for how in DAMAGES if how == "removed" or (newest / name).stat().st_size]
    cases = [(name, how) for name, how in cases if re.search(case, f"{name} {how}")]
    missed = 0
    for name, how in cases[::every]:
        workdir = folder / f"damaged{processes}"
        shutil.rmtree(workdir, ignore_errors=True)
        log_of(workdir).unlink(missing_ok=True)
        shutil.copytree(killed, workdir)
        error, aside = _continue(workdir, processes, name, how)
        missed += not aside
        if not error and (different := differing(contents(workdir, phases), wanted)):
            error = f"{len(different)} of {len(wanted)} values differ: {different[:3]}"
        trial.case(f"{name} {how}", error)
        print(f"    {trial.name}: {name} {how}: {'failed' if error else 'equal'}", flush=True)
    trial.worst = f"{len(files)} files; {missed} cases continue from the newest checkpoint, which needs no such file"
    return trial


def _continue(workdir: pathlib.Path, processes: int, name: str, how: str) -> tuple[str, bool]:
    """Damages a file and runs to the end: (what was wrong, whether the checkpoint was kept apart)."""
    newest = workdir / PHASE / "checkpoints" / str(PHASES[PHASE])
    data = DAMAGES[how]((newest / name).read_bytes())
    (newest / name).unlink() if data is None else (newest / name).write_bytes(data)
    started = start(workdir, processes, **CHANGES)
    statuses = wait_for(started, PATIENCE)
    kill(started)
    text, aside = log_of(workdir).read_text(), (workdir / PHASE / DAMAGED / newest.name).is_dir()
    if statuses != [0] * processes:
        return f"statuses {statuses}: {text[-800:]}", aside
    # A flipped bit of the record may change what it states about another file.
    named = newest if name == f"{ITEM}/{DIGESTS}" else newest / name
    lines = [line for line in text.splitlines() if f"- {named}" in line and "expected" in line]
    only_marks = not name.startswith(f"{ITEM}/") or name.endswith("commit_success.txt")
    may_be_missed = only_marks or (name == f"{ITEM}/{DIGESTS}" and how == "removed")
    if aside and (f"checkpoint {newest} is damaged" not in text or (not lines and not may_be_missed)):
        return f"not named: {text[-800:]}", aside
    if not aside and not may_be_missed:
        return "not noticed", aside
    return "", aside


def main() -> int:
    """Runs the trial and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/damage", type=pathlib.Path, help="replaced if it exists")
    parser.add_argument("--processes", default=1, type=int)
    parser.add_argument("--every", default=1, type=int, help="try every N-th case")
    parser.add_argument("--case", default="", help="try only cases whose name matches this regular expression")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    prepare(folder, anew=True)
    return print_trials([(damage_each_file, folder, arguments.processes, arguments.every, arguments.case)])


if __name__ == "__main__":
    sys.exit(main())
