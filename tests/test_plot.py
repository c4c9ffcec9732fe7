"""The curves of a run: reading its logs and drawing them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from melt_jax import plot
from melt_jax.config import InputError

T, L = 3, 2


def write_run(folder, lines=(4, 2), phases=("transition", "alignment")):
    """A workdir like those of `melt_jax.train`: phases of 40 steps, a line every 10, values by loop and layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"phases": phases, **{name: {"steps": 40} for name in phases}}
    (folder / "config.json").write_text(json.dumps(config))
    for phase, count in zip(phases, lines):
        records = []
        for i in range(1, count + 1):
            record = {"phase": phase, "step": 10 * i, "gradient_norm/backbone": 1.0, "gradient_norm/gate": 0.5}
            for t in range(1, T + 1):
                record[f"kd/loop{t}"] = 1.0 / i + t
                for layer in range(1, L + 1):
                    record[f"gate_openness/loop{t}/layer{layer}"] = 0.1 * t + 0.2 * layer
                    if phase == "alignment":
                        record[f"alignment/loop{t}/layer{layer}"] = 10.0 * t
            if phase == "transition":
                record["alpha"] = i / count
            records.append(json.dumps(record) + "\n")
        (folder / phase).mkdir()
        (folder / phase / "metrics.jsonl").write_text("".join(records))
    return folder


def test_phases_share_an_axis_and_layers_are_averaged(tmp_path):
    run = plot.read_run(write_run(tmp_path))
    assert run.phases == {"transition": (0, 40), "alignment": (40, 80)}
    assert run.curves["kd"]["loop2"][0] == [10, 20, 30, 40, 50, 60]
    assert run.curves["alignment"]["loop3"] == ([50, 60], [30.0, 30.0])
    assert run.curves["gate_openness"]["loop1"][1] == pytest.approx([0.4] * 6)
    assert run.curves["alpha"]["alpha"] == ([10, 20, 30, 40], [0.25, 0.5, 0.75, 1.0])


def test_curves_are_drawn_once_with_one_color_each(tmp_path):
    run = plot.read_run(write_run(tmp_path))
    figure = plot.draw(run)
    lines = {axes.get_title("left"): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    drawn = [{name for name in panel if not name.startswith("_")} for panel in lines.values()]
    loops = {f"loop{t}" for t in range(1, T + 1)}
    assert drawn == [loops, loops | {"alpha"}, loops, {"backbone", "gate"}]
    for name in loops:
        assert len({panel[name].get_color() for panel in lines.values() if name in panel}) == 1
    kl = lines["KL(teacher ‖ student), nats per token"]["loop1"]
    assert list(kl.get_ydata()) == run.curves["kd"]["loop1"][1]
    boundaries = [
        [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] for axes in figure.axes
    ]
    assert boundaries == [[40]] * 4


def test_pretraining_has_its_own_panels(tmp_path):
    write_run(tmp_path, (1,), ("pretraining",))
    record = {"step": 5, "cross_entropy/loop1": 2.0, "exit_probability/loop1": 1.0, "gradient_norm/backbone": 3.0}
    (tmp_path / "pretraining/metrics.jsonl").write_text(json.dumps(record) + "\n")
    titles = [axes.get_title("left") for axes in plot.draw(plot.read_run(tmp_path)).axes]
    assert titles == ["cross-entropy, nats per token", "exit probability", "gradient norm before clipping"]


def test_logarithmic_axes_show_four_decades_at_most(tmp_path):
    write_run(tmp_path, (2,))
    with (tmp_path / "transition/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "kd/loop1": 1e-12}) + "\n")
    bottom, top = plot.draw(plot.read_run(tmp_path)).axes[0].get_ylim()
    assert 2 < top < 40 and bottom == pytest.approx(top / 10**4)


def test_unfinished_run_is_drawn_so_far(tmp_path):
    write_run(tmp_path, (2,))
    with (tmp_path / "transition/metrics.jsonl").open("a") as file:
        file.write('{"phase": "transition", "st')
    run = plot.read_run(tmp_path)
    assert run.curves["kd"]["loop1"][0] == [10, 20]
    assert run.phases["alignment"] == (40, 80)


def test_gates_are_drawn_by_loop_and_layer(tmp_path):
    """A heat map per phase, of its last logged step: rows are loops, columns layers."""
    gates = plot.read_gates(write_run(tmp_path, (4, 2)))
    assert list(gates) == ["transition, step 40", "alignment, step 20"]
    want = np.array([[0.1 * t + 0.2 * layer for layer in range(1, L + 1)] for t in range(1, T + 1)])
    images = [axes.images[0] for axes in plot.draw_gates(gates).axes if axes.images]
    assert len(images) == 2
    for image in images:
        np.testing.assert_allclose(image.get_array(), want)
        assert image.get_extent() == [0.5, L + 0.5, 0.5, T + 0.5] and image.origin == "lower"


def test_run_without_gates_is_named(tmp_path):
    write_run(tmp_path, (0,), ("pretraining",))
    with pytest.raises(InputError, match="expected gate_openness in the logs, found none"):
        plot.plot_run(tmp_path, tmp_path / "gates.png", gates=True)


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"expected the workdir of a run .*, found no config\.json"):
        plot.read_run(tmp_path)
    with pytest.raises(InputError, match=r"expected lines in transition/metrics\.jsonl, .* found none"):
        plot.read_run(write_run(tmp_path, ()))


def test_picture_is_written(tmp_path):
    output = tmp_path / "new/curves.png"
    plot.plot_run(write_run(tmp_path / "run"), output)
    assert output.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"--output: expected a name that ends in \.png, .*, found 'a\.txt'"):
        plot.plot_run(tmp_path / "run", tmp_path / "a.txt")


def test_command_writes_or_reports_one_line(tmp_path):
    """One line of output, and one line for bad input."""
    workdir = write_run(tmp_path / "run")

    def command(workdir):
        flags = [f"--workdir={workdir}", f"--output={tmp_path / 'curves.svg'}"]
        return subprocess.run([sys.executable, "-m", "melt_jax.plot", *flags], capture_output=True, text=True)

    done = command(workdir)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'curves.svg'}\n")
    failed = command(tmp_path)
    assert failed.returncode == 1 and "found no config.json" in failed.stderr and failed.stderr.count("\n") == 1


def test_comparison_draws_each_run_once(tmp_path):
    """Two runs of different lengths and phases share the axes: the last loop of each, in the run's color."""
    runs = {
        "long": plot.read_run(write_run(tmp_path / "long")),
        "short": plot.read_run(write_run(tmp_path / "short", lines=(3,), phases=("transition",))),
    }
    figure = plot.draw_comparison(runs)
    panels = {axes.get_title("left"): axes for axes in figure.axes}
    kl = {line.get_label(): line for line in panels["KL(teacher ‖ student), nats per token"].lines}
    for label, run in runs.items():
        steps, values = run.curves["kd"][f"loop{T}"]
        assert (list(kl[label].get_xdata()), list(kl[label].get_ydata())) == (steps, values)
    assert kl["long"].get_color() != kl["short"].get_color()
    norm = [line for line in panels["gradient norm before clipping"].lines if line.get_label() == "long"]
    assert set(norm[0].get_ydata()) == {1.0}  # the backbone's
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long", "short"]
    alignment = panels["attention alignment, scaled as alignment.reduction says"].lines
    assert [line.get_label() for line in alignment if not line.get_label().startswith("_")] == ["long"]
    assert all(axes.get_xlim() == (0, 80) for axes in figure.axes)


def test_labels_tell_runs_apart():
    assert list(plot.run_labels(["runs/a", "runs/b"])) == ["a", "b"]
    assert list(plot.run_labels(["x/a", "y/a"])) == ["x/a", "y/a"]
    with pytest.raises(InputError, match="--workdir: expected different folders, found a, a"):
        plot.run_labels(["a", "a"])


def test_differing_config_keys_are_listed():
    configs = [{"seed": 0, "data": {"batch": 4, "path": ""}}, {"seed": 1, "data": {"batch": 4}}]
    assert plot.config_differences(configs) == ["data.path: , none", "seed: 0, 1"]


def test_command_compares_workdirs(tmp_path):
    workdirs = [str(write_run(tmp_path / name, phases=phases, lines=(2, 2)[: len(phases)]))
                for name, phases in (("a", ("transition",)), ("b", ("transition", "alignment")))]  # fmt: skip
    lines = plot.plot_comparison(workdirs, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert lines == ["alignment.steps: none, 40", "phases: ['transition'], ['transition', 'alignment']"]
