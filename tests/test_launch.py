"""The launch scripts: what they run, on which status they start it again, with stand-ins for what they drive."""

import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from melt_jax.config import freeze
from melt_jax.training.preemption import PREEMPTED, STALLED

ROOT = pathlib.Path(__file__).parent.parent


def run(tmp_path, command, **programs):
    """Runs a script with stand-ins first on the PATH; returns (status, output, calls of the stand-ins)."""
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{text}')
        path.chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON_RUN": "python", "POLL": "0"}
    environment |= {"SLURM_JOB_ID": "7", "ZONE": "z", "ACCELERATOR": "v6e-16", "RUNTIME": "r", "NFS": "n:/s"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, calls.read_text()


@pytest.mark.parametrize("status, again", [(0, False), (1, False), (PREEMPTED, True), (STALLED, True), (134, True)])
def test_slurm_requeues(tmp_path, status, again):
    command = ["bash", "launch/slurm.sbatch", "--workdir=a b"]
    left, output, calls = run(tmp_path, command, srun=f"exit {status}", scontrol="exit 0")
    assert f"status {status}: " in output and left == (0 if again else status)
    assert ("scontrol requeue 7" in calls) == again


def test_queued_resource_is_asked_for_again_when_it_is_taken(tmp_path):
    """States and statuses one after the other: taken while training, stalled once, then to the end."""
    (tmp_path / "states").write_text("\nWAITING_FOR_RESOURCES\nACTIVE\nSUSPENDED\nSUSPENDED\nACTIVE\nACTIVE\nACTIVE\n")
    (tmp_path / "statuses").write_text("0\n75\n0\n76\n0\n0\n")
    take = "head -1 {0}/{1}; sed -i 1d {0}/{1}"
    gcloud = f"""case $4 in
        list) {take.format(tmp_path, "states")} ;;
        ssh) exit $({take.format(tmp_path, "statuses")}) ;;
    esac"""
    command = ["launch/tpu_queued_resource.sh", "melt-1", "--workdir=a b"]
    left, output, calls = run(tmp_path, command, gcloud=gcloud, git="")
    assert left == 0 and "the run has ended" in output
    verbs = [line.split()[4] for line in calls.splitlines() if line.startswith("gcloud compute tpus queued-resources")]
    start = ["scp", "ssh", "ssh"]
    taken, stalled = ["list"] * 2 + ["delete"], ["list"]
    look = ["list"]
    assert verbs == look + ["create"] + look * 2 + start + taken + look + start + stalled + look + start + ["delete"]
    assert r"--workdir=a\ b" in calls


def test_queued_resource_stops_on_an_error(tmp_path):
    gcloud = "case $4 in list) echo ACTIVE ;; ssh) exit 1 ;; esac"
    left, output, _ = run(tmp_path, ["launch/tpu_queued_resource.sh", "melt-1"], gcloud=gcloud, git="")
    assert left == 1 and "left with status 1" in output


def test_jobset_restarts_on_the_same_statuses():
    spec = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule] == [[PREEMPTED, STALLED, 134]]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("statuses, left", [((0, 0), 0), ((75, 75), 75), ((0, 1), 1), ((76, 134), 76)])
def test_local_processes_report_and_leave_with_what_asks_for_a_new_start(tmp_path, statuses, left):
    python = f"""
    [ "$1" != -c ] || {{ echo 1234; exit; }}
    statuses=({statuses[0]} {statuses[1]})
    exit ${{statuses[MELT_PROCESS]}}"""
    status, output, calls = run(tmp_path, ["launch/local_processes.sh", "2", "--workdir=w"], python=python)
    assert status == left and calls.count("python -m melt_jax.train --workdir=w") == 2
    assert f"process 0: status {statuses[0]}\nprocess 1: status {statuses[1]}" in output


@pytest.mark.parametrize("script", ["tpu_queued_resource.sh", "gke_jobset.yaml", "slurm.sbatch"])
def test_the_command_of_a_launcher_fits_its_config(script):
    """Every override is a key that the config accepts, and the data is of the form that its source reads."""
    text = (ROOT / "launch" / script).read_text()
    (name,) = re.findall(r"--config=configs/(\w+)\.py", text)
    config = importlib.import_module(f"configs.{name}").get_config()
    for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", text):
        *groups, last = key.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[last] = type(group[last])(value)
    data = freeze(config).data
    assert data.path.startswith("/") and bool(pathlib.Path(data.path).suffix) == (data.source == "tokens")


@pytest.fixture
def repository(tmp_path):
    """A folder with the launch scripts, a requirements.txt, and `python`: a Python as PYTHON names it, of its version.

    The environment that it makes has a Python that writes down its arguments and fails where `broken` is a file.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("jax\n")
    made = '#!/bin/bash\necho "$*" >>calls\n[ ! -e broken ]\n'
    (tmp_path / "python").write_text(f"""#!/bin/bash
    case $1 in
        -c) [ "$VERSION" != 3.10 ] ;;
        --version) echo "Python $VERSION" ;;
        -m) echo "$*" >>calls; rm -rf .venv; mkdir -p .venv/bin
            printf {shlex.quote(made)} >.venv/bin/python; chmod +x .venv/bin/python ;;
    esac""")
    (tmp_path / "python").chmod(0o755)

    def run(script, *arguments, version="3.12"):
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "VERSION": version}
        (tmp_path / "calls").write_text("")
        command = ["bash", f"launch/{script}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "calls").read_text()

    return tmp_path, run


def test_setup_wants_a_python_that_is_new_enough_and_is_done_only_when_whole(repository):
    folder, run = repository
    status, output, _ = run("main_job.sh", version="3.10")
    assert status == 1 and not (folder / ".venv").exists()
    assert "expected Python 3.11 or later, found Python 3.10; PYTHON=" in output
    (folder / "broken").touch()
    status, _, calls = run("main_job.sh")
    assert status != 0 and "-m venv --clear .venv" in calls and "melt_jax" not in calls
    (folder / "broken").unlink()
    made = []
    for _ in range(2):
        status, _, calls = run("main_job.sh")
        assert status == 0
        made.append("-m venv" in calls)
    (folder / "requirements.txt").write_text("jax\nflax\n")
    made.append("-m venv" in run("main_job.sh")[2])
    assert made == [True, False, True]


@pytest.mark.parametrize(
    "stated, dtype",
    [
        ('"torch_dtype": "bfloat16"', "bfloat16"),
        ('"dtype":"bfloat16"', "bfloat16"),
        ('"torch_dtype": "float32"', "float32"),
        ('"a": 1', "float32"),
    ],
)
def test_the_main_job_publishes_in_the_dtype_that_the_looplm_states(repository, stated, dtype):
    folder, run = repository
    (folder / "ouro").mkdir()
    (folder / "ouro/config.json").write_text(f"{{{stated}}}")
    status, output, calls = run("main_job.sh", "configs/ouro_1_4b.py", "ouro", "runs/a b", "--config.seed=3")
    assert status == 0, output
    first, train, last = (line for line in calls.splitlines() if "melt_jax" in line)
    assert "--input=ouro --output=runs/a b/teacher --to=orbax" in first
    assert train.endswith("--config.teacher=runs/a b/teacher --config.seed=3") and "configs/ouro_1_4b.py" in train
    assert last.endswith(f"--input=runs/a b/alignment/model --output=runs/a b/melt --to=published --dtype={dtype}"
                         " --overwrite")  # fmt: skip


def sweep(*arguments):
    command = [sys.executable, "launch/sweep.py", "--config=configs/nano.py", "--workdir=runs/w", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_sweep_prints_a_command_for_every_combination():
    done = sweep("--print", "a=1,2", "b=3")
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    train = ["-m", "melt_jax.train", "--config=configs/nano.py"]
    assert done.returncode == 0 and commands == [
        [*train, f"--workdir=runs/w/a={a},b=3", f"--config.a={a}", "--config.b=3"] for a in (1, 2)
    ]


@pytest.mark.parametrize("override, found", [("a", "found 'a'"), ("a=1,", "found 'a=1,'"), ("b=1", "b is given twice")])
def test_a_sweep_refuses_what_is_no_override(override, found):
    done = sweep("--print", "b=2", override)
    assert done.returncode == 2 and found in done.stderr and not done.stdout
