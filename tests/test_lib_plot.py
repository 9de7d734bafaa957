"""The picture of training runs: what is drawn, that it is written and readable, and what a mistake is answered with."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROCESS_ENVIRONMENT, ROOT
from matplotlib.colors import to_hex
from PIL import Image

from lib import plot
from lib.errors import MissingFileError, UserError

TERMS = [f"alignment{stage}" for stage in range(1, 5)]
TRAIN_PANELS = {
    "Loss": ["loss"], "Segmentation loss": ["segmentation"], "Alignment": TERMS, "Learning rate": ["lr"],
    "Gradient norm": ["grad_norm"], "Samples / s": ["samples_per_second"],
}  # fmt: skip
EVALUATED = ["oIoU", "mIoU", "P@0.5", "P@0.9"]


def made_run(seed=0, epochs=4, alignment=True):
    """The lines of a run: 5 logged steps and an evaluation per epoch, no value twice."""
    source, run = np.random.default_rng(seed), []
    names = ["loss", "segmentation", *(TERMS if alignment else []), "lr", "grad_norm", "samples_per_second"]
    for epoch in range(1, epochs + 1):
        for step in range(50 * epoch - 40, 50 * epoch + 1, 10):
            values = dict(zip(names, source.uniform(0.1, 9, len(names)).tolist(), strict=True))
            run.append({"kind": "train", "step": step, "epoch": epoch, **values, "memory_gib": None, "skipped": 0})
        values = dict(zip(["loss", *EVALUATED], source.uniform(1, 90, 5).tolist(), strict=True))
        run.append({"kind": "eval", "step": 50 * epoch, "epoch": epoch, "split": "val", **values})
    return run


def write(folder, run, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, run)) + end)
    return folder


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curves(axes):
    """The lines that hold data, but for the ring around the best."""
    return [line for line in axes.lines if len(line.get_xdata()) and line.get_label() != "best oIoU"]


def column(run, kind, field):
    return [(line["step"], line[field]) for line in run if line["kind"] == kind and field in line]


def data(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def rings(figure, title="Evaluation on val, %"):
    (ring,) = [line for line in panels(figure)[title].lines if line.get_label() == "best oIoU"]
    return data(ring)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
    plot.main()


def test_every_curve_holds_the_values_of_the_file(tmp_path):
    run = made_run()
    figure = plot.draw({"demo": plot.read_metrics(write(tmp_path / "demo", run))})
    shown = panels(figure)
    assert set(shown) == {*TRAIN_PANELS, "Evaluation on val, %"}
    for title, fields in TRAIN_PANELS.items():
        expected = [column(run, "train", field) for field in fields]
        assert all(len(points) == 20 for points in expected)
        assert [data(line) for line in curves(shown[title])] == expected, title
    assert [data(line) for line in curves(shown["Evaluation on val, %"])] == [
        column(run, "eval", field) for field in EVALUATED
    ]
    assert figure.get_supxlabel() == "optimizer steps"
    for axes in figure.axes:
        assert axes.get_xlim()[0] < 0 < 200 < axes.get_xlim()[1]


def test_one_run_tells_its_curves_apart_by_colour_and_style():
    shown = panels(plot.draw({"demo": made_run()}))
    for title, labels in (("Evaluation on val, %", [*EVALUATED, "best oIoU"]), ("Alignment", list("1234"))):
        legend = shown[title].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == labels
        for entry, line in zip(legend.get_lines(), curves(shown[title]), strict=False):
            assert (entry.get_color(), entry.get_linestyle()) == (line.get_color(), line.get_linestyle())
        assert len({line.get_color() for line in curves(shown[title])}) == len(curves(shown[title]))
    assert shown["Learning rate"].get_legend() is None
    evaluation = curves(shown["Evaluation on val, %"])
    assert all(line.get_marker() not in ("", "None") for line in evaluation)
    assert max(line.get_linewidth() for line in evaluation[2:]) < min(line.get_linewidth() for line in evaluation[:2])


def test_several_runs_have_a_colour_each_and_styles_for_the_terms():
    runs = {"a": made_run(1), "b": made_run(2), "c": made_run(3, epochs=2, alignment=False)}
    figure = plot.draw(runs)
    (legend,) = figure.legends
    best = {name: max(column(run, "eval", "oIoU"), key=lambda point: point[1]) for name, run in runs.items()}
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{name} (best oIoU {best[name][1]:.2f}, step {best[name][0]})" for name in runs
    ]
    colors = dict(zip(runs, [line.get_color() for line in legend.get_lines()], strict=True))
    assert len(set(colors.values())) == 3
    for title, fields in TRAIN_PANELS.items():
        drawn = [(line.get_color(), data(line)) for line in curves(panels(figure)[title])]
        for name, run in runs.items():
            for field in fields:
                assert ((colors[name], column(run, "train", field)) in drawn) == (field in run[0]), (title, name, field)
    styles = {}
    for line in curves(panels(figure)["Alignment"]):
        styles.setdefault(line.get_color(), []).append(line.get_linestyle())
    assert styles == {colors["a"]: ["-", "--", "-.", ":"], colors["b"]: ["-", "--", "-.", ":"]}
    entries = panels(figure)["Alignment"].get_legend().get_lines()
    assert [entry.get_linestyle() for entry in entries] == ["-", "--", "-.", ":"]
    assert {entry.get_color() for entry in entries}.isdisjoint(colors.values())
    assert rings(figure) == list(best.values())


def test_the_best_evaluation_is_the_earliest_of_equal_ones_and_is_named():
    run = made_run()
    for line, value in zip([line for line in run if line["kind"] == "eval"], [61.2, 70.256, 70.256, 65], strict=True):
        line["oIoU"] = value
    figure = plot.draw({"demo": run})
    assert rings(figure) == [(100, 70.256)]
    assert figure.get_suptitle() == "demo (best oIoU 70.26, step 100)"
    assert figure.legends == []


def test_a_run_before_its_first_evaluation_and_without_alignment():
    run = [line for line in made_run(alignment=False) if line["kind"] == "train"]
    figure = plot.draw({"$new$": run})
    assert set(panels(figure)) == set(TRAIN_PANELS) - {"Alignment"}
    assert figure.get_suptitle() == "$new$"
    assert not figure._suptitle.get_parse_math()


def test_lone_points_can_be_seen():
    run = made_run(epochs=1)
    figure = plot.draw({"demo": run[4:]})  # one train line, one evaluation
    for title, axes in panels(figure).items():
        for line in curves(axes):
            assert len(line.get_xdata()) == 1
            assert line.get_marker() not in ("", "None"), title
    assert rings(figure) == [(50, run[-1]["oIoU"])]


@pytest.mark.parametrize(("low", "scale"), [(0.2, "log"), (0, "linear")])
def test_gradient_norms_are_on_a_log_scale_where_there_are_any(low, scale):
    run = [{**line, "grad_norm": low} for line in made_run()]
    assert panels(plot.draw({"demo": run}))["Gradient norm"].get_yscale() == scale


@pytest.mark.parametrize("count", [1, 3, 8])
def test_no_label_covers_another(count):
    runs = {f"refcoco_unc_base_{i}": made_run(i, epochs=40) for i in range(count)}
    for run in runs.values():
        for line in run:  # of published size: the labels with the most letters
            line["step"] *= 200
            line["lr"] = line.get("lr", 0) / 1e5
    figure = plot.draw(runs)
    figure.draw_without_rendering()
    boxes = {"names": (figure.legends[0] if count > 1 else figure._suptitle).get_window_extent()}
    boxes["steps"] = figure._supxlabel.get_window_extent()
    for title, axes in panels(figure).items():
        boxes[f"title of {title}"] = axes._left_title.get_window_extent()
        boxes[f"axes of {title}"] = axes.get_window_extent()
        boxes |= {f"{label.get_text()} of {title}": label.get_window_extent()
                  for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()
                  if axis.get_view_interval()[0] <= label.get_position()[axis is axes.yaxis]
                  <= axis.get_view_interval()[1]}  # fmt: skip
        if axes.get_legend():
            boxes[f"legend of {title}"] = axes.get_legend().get_window_extent()
    names = list(boxes)
    for i, name in enumerate(names):
        assert boxes[name].x0 >= 0, name
        assert boxes[name].x1 <= figure.bbox.x1, name
        for other in names[:i]:
            assert not boxes[name].padded(-0.5).overlaps(boxes[other].padded(-0.5)), f"{name} covers {other}"


def test_the_png_is_written_beside_the_file_and_shows_the_curves(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "demo", made_run())
    run_main(monkeypatch, folder)
    assert capsys.readouterr().out == f"{folder / 'curves.png'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]
    with Image.open(folder / "curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (2240, 1000))
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    white = (pixels == 255).all(1).mean()
    assert 0.5 < white < 0.97
    for color in plot.COLORS[:4]:
        rgb = [int(to_hex(color)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(1).sum() > 200, color


def test_a_file_and_another_place_for_the_picture(tmp_path, monkeypatch):
    first = write(tmp_path / "first", made_run(1)) / "metrics.jsonl"
    second = write(tmp_path / "second", made_run(2)) / "metrics.jsonl"
    run_main(monkeypatch, first, second.parent, "--out", tmp_path / "new" / "both")
    with Image.open(tmp_path / "new" / "both") as picture:
        assert picture.format == "PNG"
    run_main(monkeypatch, first)
    assert (first.parent / "curves.png").exists()


def test_runs_of_equal_names_are_told_apart_by_their_parents(tmp_path, monkeypatch):
    files = [tmp_path / name / "metrics.jsonl" for name in ("a/demo", "b/demo", "b/other")]
    assert plot.run_names([*files, tmp_path / "kept.jsonl"]) == ["a/demo", "b/demo", "other", "kept.jsonl"]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "demo", made_run())
    assert plot.run_names([plot.metrics_file("a/demo/../demo/")]) == ["demo"]
    with pytest.raises(UserError, match=r"a/demo/metrics\.jsonl is given twice"):
        run_main(monkeypatch, "a/demo", tmp_path / "a" / "demo", "--out", "c.png")


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path):
    run = made_run(epochs=1)
    text = write(tmp_path, run).joinpath("metrics.jsonl").read_text()
    last = len(json.dumps(run[-1]))
    for kept in range(last):
        (tmp_path / "metrics.jsonl").write_text(text[: len(text) - 1 - last + kept])
        assert plot.read_metrics(tmp_path) == run[:-1], kept
    write(tmp_path, run, end="")
    assert plot.read_metrics(tmp_path / "metrics.jsonl") == run
    (tmp_path / "metrics.jsonl").write_bytes(text.encode() + '{"kind": "é'.encode()[:-1])
    assert plot.read_metrics(tmp_path) == run


def test_other_kinds_of_lines_and_lines_that_lack_a_value(tmp_path):
    skipped = {"kind": "train", "step": 5, "epoch": 1, "samples_per_second": 3.0, "skipped": 5}
    run = [{"kind": "start", "step": "none"}, skipped, *made_run(epochs=1)]
    run[2]["note"] = "warm"
    run[3]["samples_per_second"] = None
    assert plot.read_metrics(write(tmp_path, run)) == run
    shown = panels(plot.draw({"demo": run}))
    assert [step for step, _ in data(curves(shown["Loss"])[0])] == [10, 20, 30, 40, 50]
    assert [step for step, _ in data(curves(shown["Samples / s"])[0])] == [5, 10, 30, 40, 50]


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ('{"kind": "train", "st', r"demo/metrics\.jsonl, line 2 is not JSON \(.*\): remove that line"),
        ("[1, 2]", r"demo/metrics\.jsonl, line 2 is not an object with a kind: remove that line"),
        ('{"step": 3}', r"line 2 is not an object with a kind"),
        ('{"kind": ["train"], "step": 3}', r"line 2 is not an object with a kind"),
        ('{"kind": "train", "loss": 3}', r"line 2: step must be a number, not null: correct or remove that line"),
        ('{"kind": "train", "step": 3, "loss": 1, "lr": "3e-5"}', r'line 2: lr must be a number, not "3e-5"'),
        ('{"kind": "eval", "step": 3, "oIoU": true}', r"line 2: oIoU must be a number, not true"),
    ],
)
def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path, broken, told):
    lines = [json.dumps(line) for line in made_run(epochs=1)]
    write(tmp_path / "demo", [])
    (tmp_path / "demo" / "metrics.jsonl").write_text("\n".join([lines[0], broken, *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=told) as caught:
        plot.read_metrics(tmp_path / "demo")
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(MissingFileError, match=r"no file .*nowhere: give a run's folder, such as models/<model_id>"):
        plot.read_metrics(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=rf"no file {tmp_path}/metrics\.jsonl: give a run's folder"):
        plot.read_metrics(tmp_path)
    evaluations = [line for line in made_run() if line["kind"] == "eval"]
    for run in ([], evaluations, [{"kind": "train", "step": 10, "skipped": 10}]):
        with pytest.raises(UserError, match=r"metrics\.jsonl holds no train lines with a loss: wait until"):
            plot.read_metrics(write(tmp_path, run))


def test_mistakes_on_the_command_line(tmp_path, monkeypatch):
    first, second = (write(tmp_path / name, made_run()) for name in "ab")
    for arguments, told in (
        ((), "required: RUN; see --help"),
        ((first, second), "several runs: say with --out FILE"),
        ((first, "--ouput", "c.png"), r"unknown flag --ouput; did you mean --out\?"),
        ((first, "--ou", "c.png"), r"unknown flag --ou; did you mean --out\?"),
        ((first, "--out", second), r"can't write .*b: it is a folder"),
        ((first, "--out", first / "metrics.jsonl" / "c.png"), r"can't write .*c\.png"),
    ):
        with pytest.raises(UserError, match=told):
            run_main(monkeypatch, *arguments)
    with pytest.raises(UserError, match="9 runs: one picture can tell 8 apart; name fewer"):
        plot.draw({str(i): made_run(i) for i in range(9)})
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    folder = write(tmp_path / "demo", made_run())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"drawing needs matplotlib: pip install -r requirements-extra\.txt"):
        run_main(monkeypatch, folder)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert len(plot.read_metrics(folder)) == 24


def test_as_a_command_it_needs_no_screen_and_tells_mistakes_in_a_line(tmp_path):
    folder = write(tmp_path / "demo", made_run())
    code = (
        "import sys, lib.plot; assert 'matplotlib' not in sys.modules; lib.plot.main(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    how = {"cwd": ROOT, "capture_output": True, "text": True, "env": {**PROCESS_ENVIRONMENT, "MPLBACKEND": "TkAgg"}}
    done = subprocess.run([sys.executable, "-c", code, folder], **how, check=False)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'curves.png'}\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "lib.plot", tmp_path / "nowhere"], **how, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no file ")
    assert done.stderr.count("\n") == 1
