"""The launch scripts, run with stand-ins for other programs: their commands, and the statuses on which they restart."""

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

from melt_jax.checkpoints.orbax import open_model, weights_digest
from melt_jax.config import freeze
from melt_jax.training.preemption import PREEMPTED, STALLED

ROOT = pathlib.Path(__file__).parent.parent


def run(tmp_path, command, **programs):
    """Runs a script with stand-ins first on the PATH; returns its status, its output and the stand-ins' calls."""
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{text}')
        path.chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON_RUN": "python", "POLL": "0"}
    environment |= {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "ZONE": "z",
        "ACCELERATOR": "v6e-16",
        "RUNTIME": "r",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, calls.read_text()


@pytest.mark.parametrize("status, again", [(0, False), (1, False), (PREEMPTED, True), (STALLED, True), (134, True)])
def test_slurm_requeues_on_restart_statuses(tmp_path, status, again):
    command = ["bash", "launch/slurm.sbatch", "--workdir=a b"]
    left, output, calls = run(tmp_path, command, srun=f"exit {status}", scontrol="exit 0")
    assert f"status {status}: " in output and left == (0 if again else status)
    assert ("scontrol requeue 7" in calls) == again


def test_slurm_job_ends_on_a_recorded_failure(tmp_path):
    """One process fails and JAX aborts the others, so srun's status, the largest, is 134."""
    srun = 'echo "process 0: SaveError: disk full" >"$MELT_FAILED"; exit 134'
    left, output, calls = run(tmp_path, ["bash", "launch/slurm.sbatch", "--workdir=a"], srun=srun, scontrol="exit 0")
    assert left == 1 and "SaveError: disk full" in output and "requeue" not in calls


def test_preempted_queued_resource_is_requested_again(tmp_path):
    """The machines are preempted during training, then the run stalls once, then it completes."""
    (tmp_path / "states").write_text("\nWAITING_FOR_RESOURCES\nACTIVE\nSUSPENDED\nSUSPENDED\nACTIVE\nACTIVE\nACTIVE\n")
    (tmp_path / "statuses").write_text("0\n75\n0\n76\n0\n0\n")
    take = "head -1 {0}/{1}; sed -i 1d {0}/{1}"
    gcloud = f"""case $4 in
        list) {take.format(tmp_path, "states")} ;;
        ssh) exit $({take.format(tmp_path, "statuses")}) ;;
    esac"""
    command = ["launch/tpu_queued_resource.sh", "melt-1", "--workdir=a b"]
    left, output, calls = run(tmp_path, command, gcloud=gcloud, git="")
    assert left == 0 and "the run is complete" in output
    verbs = [line.split()[4] for line in calls.splitlines() if line.startswith("gcloud compute tpus queued-resources")]
    start = ["scp", "ssh", "ssh"]
    taken, stalled = ["list"] * 2 + ["delete"], ["list"]
    look = ["list"]
    assert verbs == look + ["create"] + look * 2 + start + taken + look + start + stalled + look + start + ["delete"]
    assert r"--workdir=a\ b" in calls


def test_queued_resource_stops_on_an_error(tmp_path):
    gcloud = "case $4 in list) echo ACTIVE ;; ssh) exit 1 ;; esac"
    left, output, _ = run(tmp_path, ["launch/tpu_queued_resource.sh", "melt-1"], gcloud=gcloud, git="")
    assert left == 1 and "exited with status 1" in output


def test_jobset_restarts_on_the_same_statuses():
    spec = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule] == [[PREEMPTED, STALLED, 134]]
    restart, fail = spec["failurePolicy"]["rules"]
    assert restart == {"action": "RestartJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert fail == {"action": "FailJobSet"}


@pytest.mark.parametrize("statuses, left", [((0, 0), 0), ((75, 75), 75), ((0, 1), 1), ((76, 134), 76)])
def test_local_processes_exit_with_the_restart_status(tmp_path, statuses, left):
    python = f"""
    [ "$1" != -c ] || {{ echo 1234; exit; }}
    statuses=({statuses[0]} {statuses[1]})
    exit ${{statuses[MELT_PROCESS]}}"""
    status, output, calls = run(tmp_path, ["launch/local_processes.sh", "2", "--workdir=w"], python=python)
    assert status == left and calls.count("python -m melt_jax.train --workdir=w") == 2
    assert f"process 0: status {statuses[0]}\nprocess 1: status {statuses[1]}" in output


@pytest.mark.parametrize("script", ["tpu_queued_resource.sh", "gke_jobset.yaml", "slurm.sbatch"])
def test_launcher_command_fits_its_config(script):
    """Every override is a key of the config, and the data path suits the data source."""
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
    assert data.path.startswith(("/", "gs://")) and bool(pathlib.Path(data.path).suffix) == (data.source == "tokens")


@pytest.fixture
def repository(tmp_path):
    """A folder with the launch scripts and a stand-in for Python, and a function that runs a script there.

    The stand-in creates virtual environments whose Python records its arguments, and fails if the file `broken` exists.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("jax\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
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


def test_setup_checks_python_and_restarts_when_interrupted(repository):
    folder, run = repository
    status, output, _ = run("main_job.sh", version="3.10")
    assert status == 1 and not (folder / ".venv").exists()
    assert "expected Python 3.11 or later, found Python 3.10; choose another with PYTHON=" in output
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


def test_main_job_publishes_in_the_looplms_dtype(repository):
    _, run = repository
    status, output, calls = run("main_job.sh", "configs/ouro_1_4b.py", "ouro", "runs/a b", "--config.seed=3")
    assert status == 0, output
    first, train, last = (line for line in calls.splitlines() if "melt_jax" in line)
    assert first.endswith("--input=ouro --output=runs/a b/teacher --to=orbax --keep_existing")
    assert train.endswith("--config.teacher=runs/a b/teacher --config.seed=3") and "configs/ouro_1_4b.py" in train
    assert last.endswith("--input=runs/a b --output=runs/a b/melt --to=published"
                         " --dtype_of=runs/a b/teacher --overwrite")  # fmt: skip


def test_test_tools_are_added_once(repository):
    """The checks run before pytest, which receives the arguments; the main job needs no new setup before or after."""
    folder, run = repository
    (folder / "tests").mkdir()
    assert "[test]" not in run("main_job.sh")[2]
    _, _, calls = run("test.sh", "-m", "not slow")
    assert "-m venv" not in calls and "pip install --quiet --disable-pip-version-check -e .[test]" in calls
    assert [line.split()[1] for line in calls.splitlines()[1:]] == ["ruff", "ruff", "pyright", "pytest"]
    assert calls.endswith("-m pytest -n 2 -m not slow\n")
    assert "pip" not in run("test.sh")[2] and "pip" not in run("main_job.sh")[2]
    (folder / "pyproject.toml").write_text("[project]\nname = 'a'\n")
    assert "[test]" in run("test.sh")[2]


def on_two_processes(logs, *command):
    """Runs a command on two processes; returns their statuses and outputs."""
    environment = os.environ | {"PYTHON_RUN": sys.executable, "LOGS": str(logs)}
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host\S+", "", environment["XLA_FLAGS"])  # a device for each process
    command = ["launch/local_processes.sh", "2", *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    statuses = [int(status) for status in re.findall(r"^process \d: status (\d+)$", done.stdout, re.MULTILINE)]
    return statuses, done.stdout + done.stderr, (logs / "process1.log").read_text()


@pytest.mark.slow
def test_main_job_runs_on_several_processes(tmp_path):
    """Only process 0 converts and publishes; both train. A second start keeps the teacher and trains nothing."""
    overrides = {"data.batch": 2, "data.length": 32, "data.high": 2, "chunk_size": 16}
    overrides |= {"evaluation.problems": 0, "evaluation.sequences": 0, "evaluation.sample": False}
    overrides |= {f"{phase}.{key}": 1 for phase in ("transition", "alignment") for key in ("steps", "warmup_steps")}
    command = ["launch/main_job.sh", "configs/nano.py", "melt_jax/assets/ouro_nano", tmp_path / "run"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    statuses, first, second = on_two_processes(tmp_path / "logs", *command)
    assert statuses == [0, 0], first + second
    assert first.count("melt: published, gate elementwise") == 1 and "published, gate" not in second
    assert "on 2 × cpu" in first and "MELT published in" in first
    assert weights_digest(tmp_path / "run/teacher") == weights_digest(ROOT / "melt_jax/assets/ouro_nano")
    assert open_model(tmp_path / "run/melt").config.gate == "elementwise"
    statuses, first, second = on_two_processes(tmp_path / "logs", *command)
    assert statuses == [0, 0] and "teacher: exists and is kept" in first, first + second


@pytest.mark.slow
def test_failed_conversion_fails_in_all_processes(tmp_path):
    flags = ["--input=melt_jax/assets/nowhere", f"--output={tmp_path / 'output'}", "--to=orbax"]
    statuses, first, second = on_two_processes(tmp_path / "logs", sys.executable, "-m", "melt_jax.convert", *flags)
    assert statuses == [1, 1]
    assert "nowhere: expected a model checkpoint" in first and "found that it failed" in second
    assert "Traceback" not in first + second and not list(tmp_path.glob("*output*"))
