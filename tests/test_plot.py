"""The picture of a run: what is read from its logs, and what is drawn of it."""

import json

import pytest

from melt_jax import plot

T, L = 3, 2


def write_run(folder, lines=(4, 2), phases=("transition", "alignment")):
    """A workdir as `melt_jax.train` leaves it: phases of 40 steps, a line every 10, values told by loop and layer."""
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


def test_phases_follow_each_other_on_one_axis_and_layers_are_averaged(tmp_path):
    run = plot.read_run(write_run(tmp_path))
    assert run.phases == {"transition": (0, 40), "alignment": (40, 80)}
    assert run.curves["kd"]["loop2"][0] == [10, 20, 30, 40, 50, 60]
    assert run.curves["alignment"]["loop3"] == ([50, 60], [30.0, 30.0])
    assert run.curves["gate_openness"]["loop1"][1] == pytest.approx([0.4] * 6)
    assert run.curves["alpha"]["alpha"] == ([10, 20, 30, 40], [0.25, 0.5, 0.75, 1.0])


def test_each_curve_is_drawn_once_in_one_colour_per_loop(tmp_path):
    run = plot.read_run(write_run(tmp_path))
    figure = plot.draw(run)
    lines = {axes.get_title("left"): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    drawn = [{name for name in panel if not name.startswith("_")} for panel in lines.values()]
    loops = {f"loop{t}" for t in range(1, T + 1)}
    assert drawn == [loops, loops | {"alpha"}, loops, {"backbone", "gate"}]
    for name in loops:
        assert len({panel[name].get_color() for panel in lines.values() if name in panel}) == 1
    kl = lines["KL(teacher ‖ student), nats a token"]["loop1"]
    assert list(kl.get_ydata()) == run.curves["kd"]["loop1"][1]
    boundaries = [
        [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] for axes in figure.axes
    ]
    assert boundaries == [[40]] * 4


def test_pretraining_has_panels_of_its_own(tmp_path):
    write_run(tmp_path, (1,), ("pretraining",))
    record = {"step": 5, "cross_entropy/loop1": 2.0, "exit_probability/loop1": 1.0, "gradient_norm/backbone": 3.0}
    (tmp_path / "pretraining/metrics.jsonl").write_text(json.dumps(record) + "\n")
    titles = [axes.get_title("left") for axes in plot.draw(plot.read_run(tmp_path)).axes]
    assert titles == ["cross-entropy, nats a token", "exit probability", "gradient norm before clipping"]


def test_a_run_under_way_is_drawn_as_far_as_it_has_come(tmp_path):
    write_run(tmp_path, (2,))
    with (tmp_path / "transition/metrics.jsonl").open("a") as file:
        file.write('{"phase": "transition", "st')
    run = plot.read_run(tmp_path)
    assert run.curves["kd"]["loop1"][0] == [10, 20]
    assert run.phases["alignment"] == (40, 80)


def test_a_folder_without_a_run_or_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json; expected the workdir"):
        plot.read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing logged yet; expected lines in transition/metrics\.jsonl, "):
        plot.read_run(write_run(tmp_path, ()))


def test_the_command_writes_the_picture(tmp_path, capsys):
    workdir, output = write_run(tmp_path / "run"), tmp_path / "new/curves.png"
    plot.main([f"--workdir={workdir}", f"--output={output}"])
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {output}\n"


@pytest.mark.parametrize(
    "workdir, output, message", [("run", "a.txt", "ends in .png"), ("none", "a.png", "no config.json")]
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, workdir, output, message):
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        plot.main([f"--workdir={tmp_path / workdir}", f"--output={tmp_path / output}"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / output).exists()
