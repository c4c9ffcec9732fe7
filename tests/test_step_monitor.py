"""What attends a run: SIGTERM among processes, stalls, skipped steps, seconds and profiles, who the processes are."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nano
from melt_jax.config import RunConfig, freeze
from melt_jax.training import performance
from melt_jax.training.performance import Performance, StepProfiler
from melt_jax.training.preemption import PREEMPTED, STALLED, PreemptionNotice
from melt_jax.training.processes import initialize_distributed
from melt_jax.training.skipped import NonFiniteError, SkippedSteps
from melt_jax.training.step_monitor import StepMonitor
from melt_jax.training.watchdog import Watchdog
from tests.helpers.tiny import TINY

ROOT = pathlib.Path(__file__).parent.parent


def run_config(**changes):
    defaults = dict(skipped_limit=3, stall_seconds=0.0, stall_first_seconds=0.0, stall_exits=False)
    return RunConfig(**(defaults | dict(profile_start=0, profile_steps=2) | changes))


class TestPreemption:
    def test_sigterm_is_noted_during_the_steps_and_the_handler_before_comes_back(self):
        before = signal.getsignal(signal.SIGTERM)
        with PreemptionNotice() as notice:
            assert not notice.reached()
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.reached() and notice.reached()
        assert signal.getsignal(signal.SIGTERM) == before

    def test_processes_stop_at_one_step_when_one_of_them_gets_sigterm(self):
        program = """
import os, signal, time, jax
from melt_jax.training.preemption import PreemptionNotice, exit_on_sigterm
from melt_jax.training.processes import initialize_distributed
initialize_distributed()
exit_on_sigterm()
with PreemptionNotice() as notice:
    for step in range(1, 1000):
        time.sleep(0.02 * (1 + jax.process_index()))
        if step == 5 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice.reached():
            print("stopped", step)
            break
"""
        outputs = [process.communicate(timeout=120)[0] for process in start_processes(2, program)]
        assert outputs[0] == outputs[1] and outputs[0].startswith("stopped")

    def test_processes_leave_before_the_same_measurement_when_one_of_them_gets_sigterm(self):
        program = """
import os, signal, time, jax
from melt_jax.training.preemption import PreemptionNotice, exit_if_preempted
from melt_jax.training.processes import initialize_distributed
initialize_distributed()
with PreemptionNotice() as notice:
    assert not any(notice.reached() for step in range(20))
for measured in range(100):
    print("measures", measured, flush=True)
    exit_if_preempted()
    if measured == 2 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2 * (1 + jax.process_index()))
"""
        processes = start_processes(2, program)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [PREEMPTED] * 2
        assert outputs[0] == outputs[1] and "measures 2\n" in outputs[0]


def start_processes(count, program):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    shared = os.environ | {"MELT_COORDINATOR": coordinator, "MELT_PROCESSES": str(count)}
    command = [sys.executable, "-c", program]
    return [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"MELT_PROCESS": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]


def test_sigterm_while_the_last_checkpoint_is_written_is_not_lost(tmp_path):
    config = nano.get_config()
    checkpoints = SimpleNamespace(wait_until_finished=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with StepMonitor(
        "transition", freeze(config), TINY, tmp_path, config.transition.steps, 0, 0, checkpoints, None
    ) as monitor:
        assert list(monitor.enumerate([])) == [] and not monitor.preempted
        monitor.finish()
    assert monitor.preempted


def test_sigterm_after_the_last_save_is_not_lost(tmp_path):
    config = nano.get_config()
    checkpoints = SimpleNamespace(wait_until_finished=lambda: None)
    with StepMonitor(
        "transition", freeze(config), TINY, tmp_path, config.transition.steps, 0, 0, checkpoints, None
    ) as monitor:
        monitor.finish()
        os.kill(os.getpid(), signal.SIGTERM)
    assert monitor.preempted


def test_a_last_checkpoint_that_is_not_written_is_a_stall(tmp_path):
    config = nano.get_config()
    config.run.stall_seconds = config.run.stall_first_seconds = 0.2
    config.run.stall_exits = False
    checkpoints = SimpleNamespace(wait_until_finished=lambda: time.sleep(1.5))
    with StepMonitor(
        "transition", freeze(config), TINY, tmp_path, config.transition.steps, 0, 0, checkpoints, None
    ) as monitor:
        monitor.finish()
    assert "no step has finished" in (tmp_path / "stall-process0.txt").read_text()


class TestWatchdog:
    def stall(self, tmp_path, monkeypatch, hold, **changes):
        """Step 8 is dispatched and ends after `hold` seconds; returns the statuses that were asked to leave with."""
        statuses, ready, pending = [], jnp.float32(0), SimpleNamespace(is_ready=lambda: done)
        monkeypatch.setattr(os, "_exit", statuses.append)
        done = False
        with Watchdog("transition", tmp_path, run_config(**changes)) as watchdog:
            watchdog.after_dispatch(7, ready)
            time.sleep(0.2)
            watchdog.after_dispatch(8, pending)
            time.sleep(hold)
            done = True
            time.sleep(0.2)
        return statuses

    def test_a_step_that_is_dispatched_and_does_not_finish(self, tmp_path, monkeypatch):
        statuses = self.stall(tmp_path, monkeypatch, 3, stall_seconds=1.0, stall_exits=True)
        assert statuses == [STALLED]
        text = (tmp_path / "stall-process0.txt").read_text()
        assert "transition: no step has finished for 1 s" in text
        assert "(the last was step 7; the device has step 8 to finish)" in text
        assert "in stall" in text and "in _watch" in text  # the stacks of this thread and of the watchdog's

    def test_it_is_reported_once_and_the_run_may_live(self, tmp_path, monkeypatch):
        assert not self.stall(tmp_path, monkeypatch, 3, stall_seconds=1.0)
        assert (tmp_path / "stall-process0.txt").read_text().count("no step has finished") == 1

    def test_no_stall_no_report(self, tmp_path, monkeypatch):
        assert not self.stall(tmp_path, monkeypatch, 0.1, stall_seconds=20, stall_exits=True)
        assert not list(tmp_path.iterdir())

    def test_the_first_step_may_take_longer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "_exit", lambda status: None)
        with Watchdog("transition", tmp_path, run_config(stall_seconds=0.1, stall_first_seconds=1.5)):
            time.sleep(0.6)
            assert not list(tmp_path.iterdir())
            time.sleep(1.5)
        assert "(none has; no later one was dispatched)" in (tmp_path / "stall-process0.txt").read_text()


class TestSkippedSteps:
    def read(self, limit, *intervals):
        counter, step = SkippedSteps("alignment", 100, limit), 0
        for interval in intervals:
            step += len(interval)
            counter.read(step, [{"skipped": (np.float32(value), 1)} for value in interval], latest=lambda: 4)

    def test_a_few_pass(self):
        self.read(3, [1, 1, 0], [1, 1], [0, 1, 1])

    def test_a_row_over_two_intervals_stops(self):
        with pytest.raises(NonFiniteError) as error:
            self.read(3, [1, 0, 0, 1], [1, 1, 1])
        text = str(error.value)
        assert "alignment: the loss or a gradient was not finite in 3 steps in a row, 4 to 6" in text
        assert "(batches 103 to 105 of the run)" in text and "those of step 3" in text and "checkpoint 4" in text

    def test_a_row_goes_on_where_a_checkpoint_left_it(self):
        counter = SkippedSteps("alignment", 100, limit=3, start=7, row=2)
        with pytest.raises(NonFiniteError, match=r"in 3 steps in a row, 6 to 8 .*checkpoint 4"):
            counter.read(8, [{"skipped": (np.float32(1), 1)}], latest=lambda: 4)
        with pytest.raises(NonFiniteError, match=r"in 3 steps in a row, 5 to 7 .*checkpoint 7"):
            SkippedSteps("alignment", 100, limit=3, start=7, row=3)


class TestPerformance:
    def test_seconds_tokens_and_mfu_by_a_clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(performance.time, "perf_counter", lambda: now[0])

        def batches():
            for batch in range(4):
                now[0] += 0.25  # to make
                yield batch

        with Performance(tokens=1000, flops=6e9, peak=1e10) as measured:
            jax.monitoring.record_event_duration_secs(performance.COMPILE_EVENT, 5.0)
            for _ in measured.timed(batches()):
                now[0] += 1.75 + (5 if now[0] < 1 else 0)
            first = measured.read(4)
            now[0] += 4
            second = measured.read(2)
        assert first == {
            "seconds_per_step": 2, "tokens_per_second": 500, "data_seconds": 1, "mfu": 0.3, "compile_seconds": 5,
        }  # fmt: skip
        assert second == {"seconds_per_step": 2, "tokens_per_second": 500, "data_seconds": 0, "mfu": 0.3}

    def test_jax_tells_of_compilation(self):
        with Performance(1, 1) as measured:
            jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0)).block_until_ready()
            assert 0 < measured.read(1)["compile_seconds"]
            assert "compile_seconds" not in measured.read(1)

    def test_the_peak_is_that_of_all_devices_where_the_chip_is_known(self, monkeypatch):
        assert performance.peak_flops() is None
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")] * 8)
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        assert performance.peak_flops() == 8 * 197e12

    def test_chosen_steps_are_profiled(self, tmp_path):
        traced = []
        with StepProfiler(tmp_path, run_config(profile_start=3, profile_steps=2)) as profiler:
            for step in range(1, 7):
                with profiler.annotate(step, jnp.zeros(())):
                    traced += [step] if profiler._tracing else []
        assert traced == [3, 4]
        assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


class TestProcesses:
    @pytest.fixture(autouse=True)
    def joined(self, monkeypatch):
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
        for name in ("MELT_COORDINATOR", "MELT_PROCESSES", "MELT_PROCESS", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        return calls

    def test_a_process_of_its_own(self, joined, monkeypatch):
        initialize_distributed()
        monkeypatch.setenv("MELT_PROCESSES", "1")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        initialize_distributed()
        assert joined == []

    def test_as_told_or_as_slurm_has_it(self, joined, monkeypatch):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        initialize_distributed()
        for name, value in (("COORDINATOR", "host:1234"), ("PROCESSES", "3"), ("PROCESS", "2")):
            monkeypatch.setenv(f"MELT_{name}", value)
        initialize_distributed()
        assert joined == [(), ("host:1234", 3, 2)]

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"MELT_PROCESS": "0"}, "MELT_COORDINATOR, MELT_PROCESSES: expected"),
            ({"MELT_COORDINATOR": "h:1", "MELT_PROCESSES": "2", "MELT_PROCESS": "2"}, "0 <= process < processes"),
            ({"MELT_COORDINATOR": "h", "MELT_PROCESSES": "2", "MELT_PROCESS": "0"}, "address:port, found 'h'"),
        ],
    )
    def test_half_told(self, monkeypatch, values, message):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message):
            initialize_distributed()
