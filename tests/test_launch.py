"""The launch scripts: on which status of the run they start it again, with stand-ins for what they drive."""

import os
import pathlib
import subprocess

import pytest
import yaml

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
