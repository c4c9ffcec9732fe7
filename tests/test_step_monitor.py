"""The step monitor: SIGTERM, stalls, skipped steps, performance and profiles; and how processes join."""

import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nano
from melt_jax.config import InputError, RunConfig, freeze
from melt_jax.training import performance, watchdog
from melt_jax.training.performance import Performance, StepProfiler
from melt_jax.training.preemption import PREEMPTED, STALLED, PreemptionNotice
from melt_jax.training.processes import initialize_distributed
from melt_jax.training.skipped import NonFiniteError, SkippedSteps
from melt_jax.training.step_monitor import PhaseStart, StepMonitor
from melt_jax.training.watchdog import Watchdog
from tests.helpers.start_processes import start_processes
from tests.helpers.tiny import TINY


def run_config(**changes):
    defaults = dict(
        skipped_limit=3, stall_seconds=0.0, stall_first_seconds=0.0, stall_exits=False, lost_seconds=100, wandb=""
    )
    return RunConfig(**(defaults | dict(profile_start=0, profile_steps=2) | changes))


class TestPreemption:
    def test_sigterm_is_noted_and_the_handler_restored(self):
        before = signal.getsignal(signal.SIGTERM)
        with PreemptionNotice() as notice:
            assert not notice.reached()
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.reached() and notice.reached()
        assert signal.getsignal(signal.SIGTERM) == before

    def test_processes_stop_at_one_step(self):
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
        outputs = [process.communicate(timeout=900)[0] for process in start_processes(2, "-c", program)]
        assert outputs[0] == outputs[1] and outputs[0].startswith("stopped")

    @pytest.mark.slow
    def test_processes_exit_before_the_same_measurement(self):
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
        processes = start_processes(2, "-c", program)
        outputs = [process.communicate(timeout=900)[0] for process in processes]
        assert [process.returncode for process in processes] == [PREEMPTED] * 2
        assert outputs[0] == outputs[1] and "measures 2\n" in outputs[0]


@pytest.fixture
def monitor(tmp_path):
    """A function that builds the `StepMonitor` of a transition of 100 steps."""

    def build(start=0, wait=lambda: None, **run):
        config = nano.get_config()
        config.transition.steps, config.log_every = 100, 50
        config.run.update(run)
        checkpoints = SimpleNamespace(wait_until_finished=wait)
        return StepMonitor("transition", freeze(config), TINY, tmp_path, PhaseStart(start), checkpoints, None)

    return build


class FakeDevice:
    """Runs a step only when the host waits for one of its outputs."""

    def __init__(self):
        self.unfinished = []

    def dispatch(self, step):
        self.unfinished.append(step)
        return {"loss": (FakeArray(self, step), 1), "skipped": (np.float32(0), 1)}

    def run(self, step):
        self.unfinished = [other for other in self.unfinished if other > step]


class FakeArray:
    """An output of a step."""

    def __init__(self, device, step):
        self._device, self._step = device, step

    def is_ready(self):
        return self._step not in self._device.unfinished

    def block_until_ready(self):
        self._device.run(self._step)
        return self

    def __array__(self, dtype=None, copy=None):
        self._device.run(self._step)
        return np.zeros((), np.float32)


class TestStepMonitor:
    def run(self, monitor, event=lambda step: None, event_after=lambda step: None):
        """Runs a loop like the trainer's; returns {step: unfinished steps at its dispatch} and the last step."""
        device, unfinished = FakeDevice(), {}
        with monitor:
            for step, _ in monitor.enumerate(range(100)):
                with monitor.annotate(step, None):
                    unfinished[step] = list(device.unfinished)
                    metrics = device.dispatch(step)
                event(step)
                last = monitor.after_dispatch(step, metrics)
                event_after(step)
                if last:
                    break
            monitor.finish()
        return unfinished, step

    def test_host_is_one_step_ahead(self, monitor):
        """Before step n + 1 is dispatched, step n − 1 has finished, but step n has not."""
        unfinished, last = self.run(monitor())
        assert unfinished == {1: []} | {step: [step - 1] for step in range(2, 101)} and last == 100

    def test_sigterm_is_answered_within_a_step(self, monitor):
        def sigterm_at(step):
            return lambda at: os.kill(os.getpid(), signal.SIGTERM) if at == step else None

        assert self.run(monitor(), event=sigterm_at(7))[1] == 7
        assert self.run(monitor(), event_after=sigterm_at(7))[1] == 8

    def test_implicit_transfers_raise_in_a_step(self, monitor):
        step, state = jax.jit(lambda state, batch: state + batch), jnp.zeros(3)
        with monitor() as steps:
            with steps.annotate(1, state):
                state = step(state, jax.device_put(np.ones(3, np.float32)))
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
                with steps.annotate(2, state):
                    step(state, np.ones(3, np.float32))

    def test_sigterm_during_the_last_save_is_noted(self, monitor):
        with monitor(100, wait=lambda: os.kill(os.getpid(), signal.SIGTERM)) as steps:
            assert list(steps.enumerate([])) == [] and not steps.preempted
            steps.finish()
        assert steps.preempted

    def test_sigterm_after_the_last_save_is_noted(self, monitor):
        with monitor(100) as steps:
            steps.finish()
            os.kill(os.getpid(), signal.SIGTERM)
        assert steps.preempted

    def test_unfinished_save_is_a_stall(self, monitor, tmp_path):
        report = tmp_path / "stall-process0.txt"
        with monitor(
            100, lambda: wait_for(report.exists), stall_seconds=0.05, stall_first_seconds=0.05, stall_exits=False
        ) as steps:
            steps.finish()
        assert "no step has finished" in report.read_text()


def wait_for(condition):
    """Polls until the condition holds; gives up after ten minutes."""
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestWatchdog:
    """The tests set the clock; only the last test starts the thread."""

    @pytest.fixture
    def now(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
        return now

    @pytest.fixture
    def statuses(self, monkeypatch):
        """The statuses with which the process would have exited."""
        statuses = []
        monkeypatch.setattr(os, "_exit", statuses.append)
        return statuses

    def stall(self, folder, now, seconds, **changes):
        """Step 7 finishes at 1 s; step 8 is dispatched and takes that many seconds more."""
        dog, device = Watchdog("transition", folder, run_config(stall_seconds=10.0, **changes)), FakeDevice()
        dog.after_dispatch(7, FakeArray(device, 7))
        now[0] = 1.0
        dog.check()
        dog.after_dispatch(8, device.dispatch(8)["loss"][0])
        for _ in range(seconds):
            now[0] += 1
            dog.check()
        device.run(8)
        now[0] += 9
        dog.check()
        return folder / "stall-process0.txt"

    def test_dispatched_step_that_never_finishes_is_reported(self, tmp_path, now, statuses):
        text = self.stall(tmp_path, now, 11, stall_exits=True).read_text()
        assert "transition: no step has finished for 10 s (the last was step 7; step 8 is running), process 0" in text
        assert statuses == [STALLED]

    def test_stall_is_reported_once(self, tmp_path, now, statuses):
        assert self.stall(tmp_path, now, 50).read_text().count("no step has finished") == 1 and not statuses

    def test_no_stall_is_not_reported(self, tmp_path, now, statuses):
        assert not self.stall(tmp_path, now, 10, stall_exits=True).exists() and not statuses

    def test_first_step_may_take_longer(self, tmp_path, now):
        dog = Watchdog("transition", tmp_path, run_config(stall_seconds=1.0, stall_first_seconds=15.0))
        for now[0], reported in ((15.0, False), (16.0, True)):
            dog.check()
            assert (tmp_path / "stall-process0.txt").exists() == reported
        assert "(none so far; no later step was dispatched)" in (tmp_path / "stall-process0.txt").read_text()

    def test_first_step_may_take_any_time(self, tmp_path, now):
        dog = Watchdog("transition", tmp_path, run_config(stall_seconds=1.0, stall_first_seconds=0.0))
        now[0] = 1e9
        dog.check()
        assert not (tmp_path / "stall-process0.txt").exists()

    def test_thread_writes_all_stacks(self, tmp_path):
        report = tmp_path / "stall-process0.txt"
        with Watchdog("transition", tmp_path, run_config(stall_seconds=0.05, stall_first_seconds=0.05)):
            wait_for(lambda: report.exists() and "in _poll" in report.read_text())
        assert "in wait_for" in report.read_text()


class TestSkippedSteps:
    def read(self, limit, *intervals):
        counter, step = SkippedSteps("alignment", 100, limit), 0
        for interval in intervals:
            step += len(interval)
            counter.read(step, [{"skipped": (np.float32(value), 1)} for value in interval], latest=lambda: 4)

    def test_few_skipped_steps_are_tolerated(self):
        self.read(3, [1, 1, 0], [1, 1], [0, 1, 1])

    def test_skipped_steps_count_across_intervals(self):
        with pytest.raises(NonFiniteError) as error:
            self.read(3, [1, 0, 0, 1], [1, 1, 1])
        text = str(error.value)
        assert "alignment: the loss or a gradient was not finite in 3 steps in a row, 4 to 6" in text
        assert "(batches 103 to 105 of the run)" in text and "those of step 3" in text and "checkpoint 4" in text

    def test_causes_of_skipped_steps_are_named(self, capsys):
        counter = SkippedSteps("alignment", 100, limit=3)
        cause = {"not_finite/loss": (np.float32(0), 1), "not_finite/gradient_norm/gate": (np.float32(1), 1)}
        steps = [{"skipped": (np.float32(value), 1), **cause} for value in (0, 1)]
        counter.read(2, steps, latest=lambda: None)
        begin = "warning: alignment: step 2 (batch 101 of the run) skipped: gradient_norm/gate not finite"
        assert capsys.readouterr().out == f"{begin}\n"
        counter.read(2, steps, latest=lambda: None, weights=lambda: list("abcd"))
        assert capsys.readouterr().out == f"{begin}; so are the weights a, b, c and 1 more, and no later step can be\n"

    def test_skipped_steps_count_across_restarts(self):
        counter = SkippedSteps("alignment", 100, limit=3, start=7, row=2)
        with pytest.raises(NonFiniteError, match=r"in 3 steps in a row, 6 to 8 .*checkpoint 4"):
            counter.read(8, [{"skipped": (np.float32(1), 1)}], latest=lambda: 4)
        with pytest.raises(NonFiniteError, match=r"in 3 steps in a row, 5 to 7 .*checkpoint 7"):
            SkippedSteps("alignment", 100, limit=3, start=7, row=3)


class TestPerformance:
    def test_speed_and_mfu_follow_the_clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(performance.time, "perf_counter", lambda: now[0])

        def batches():
            for batch in range(4):
                now[0] += 0.25  # the loop waits for the batch
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

    def test_compile_seconds_are_measured(self):
        with Performance(1, 1) as measured:
            jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0)).block_until_ready()
            assert 0 < measured.read(1)["compile_seconds"]
            assert "compile_seconds" not in measured.read(1)

    def test_peak_is_that_of_all_devices(self, monkeypatch):
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
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
        for name in ("MELT_COORDINATOR", "MELT_PROCESSES", "MELT_PROCESS", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        return calls

    def test_single_process_does_not_join(self, joined, monkeypatch):
        initialize_distributed()
        monkeypatch.setenv("MELT_PROCESSES", "1")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        initialize_distributed()
        assert joined == []

    def test_variables_come_before_slurm(self, joined, monkeypatch):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        initialize_distributed()
        for name, value in (("COORDINATOR", "host:1234"), ("PROCESSES", "3"), ("PROCESS", "2")):
            monkeypatch.setenv(f"MELT_{name}", value)
        initialize_distributed()
        assert joined == [(), ("host:1234", 3, 2)]
        for coordinator in ("10.0.0.7:8476", "[::1]:8476", "run-0.pods.default.svc:8476", "h:1"):
            monkeypatch.setenv("MELT_COORDINATOR", coordinator)
            initialize_distributed()
            assert joined[-1] == (coordinator, 3, 2)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"MELT_PROCESS": "0"}, "MELT_COORDINATOR, MELT_PROCESSES: expected a value"),
            ({"MELT_COORDINATOR": "h:1", "MELT_PROCESSES": "2", "MELT_PROCESS": "2"}, "0 <= process < processes"),
            *(
                ({"MELT_COORDINATOR": found, "MELT_PROCESSES": "2", "MELT_PROCESS": "0"}, f"port.*, found '{found}'")
                for found in ("h", "h:", ":1", "h:x", "h:0", "h:65536", "h:1:2", "tcp://h:1", "a b:1", "h:1 ", "-h:1")
            ),
        ],
    )
    def test_invalid_variables_are_errors(self, monkeypatch, values, message):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=message):
            initialize_distributed()
