"""python -m lib.plot: the curves and labels of the figure, the PNG, and the messages for mistakes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROCESS_ENVIRONMENT, ROOT
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from lib import plot
from lib.charts import COLORS
from lib.errors import MissingFileError, UserError
from lib.report.curves import draw_curves, find_metrics_file, read_metrics, run_names

TERMS = [f"alignment{stage}" for stage in range(1, 5)]
TRAIN_PANELS = {
    "Loss": ["loss"],
    "Segmentation loss": ["segmentation"],
    "Alignment": TERMS,
    "Learning rate": ["lr"],
    "Gradient norm": ["grad_norm"],
    "Samples / s": ["samples_per_second"],
}
EVALUATED = ["oIoU", "mIoU", "P@0.5", "P@0.9"]


def random_run(seed=0, epochs=4, alignment=True):
    """Return the lines of a run: 5 logged steps and an evaluation per epoch; all values differ."""
    generator, run = np.random.default_rng(seed), []
    names = ["loss", "segmentation", *(TERMS if alignment else []), "lr", "grad_norm", "samples_per_second"]
    for epoch in range(1, epochs + 1):
        for step in range(50 * epoch - 40, 50 * epoch + 1, 10):
            values = dict(zip(names, generator.uniform(0.1, 9, len(names)).tolist(), strict=True))
            run.append({"kind": "train", "step": step, "epoch": epoch, **values, "memory_gib": None, "skipped": 0})
        values = dict(zip(["loss", *EVALUATED], generator.uniform(1, 90, 5).tolist(), strict=True))
        run.append({"kind": "eval", "step": 50 * epoch, "epoch": epoch, "split": "val", **values})
    return run


def write(folder, run, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, run)) + end)
    return folder


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def text_of(artist, content):
    """Return the text object with this content."""
    (text,) = artist.findobj(lambda item: isinstance(item, Text) and item.get_text() == content)
    return text


def curves(axes):
    """Return the lines with data, except the marker of the best oIoU."""
    return [line for line in axes.lines if len(line.get_xdata()) and line.get_label() != "best oIoU"]


def column(run, kind, field):
    return [(line["step"], line[field]) for line in run if line["kind"] == kind and field in line]


def data(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def best_markers(figure, title="Evaluation on val, %"):
    (marker,) = [line for line in panels(figure)[title].lines if line.get_label() == "best oIoU"]
    return data(marker)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
    plot.main()


def test_every_curve_has_the_values_of_the_file(tmp_path):
    run = random_run()
    figure = draw_curves({"demo": read_metrics(write(tmp_path / "demo", run))})
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


def test_the_curves_of_one_run_differ_in_color_and_style():
    shown = panels(draw_curves({"demo": random_run()}))
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


def test_each_of_several_runs_has_a_color_and_each_term_a_style():
    runs = {"a": random_run(1), "b": random_run(2), "c": random_run(3, epochs=2, alignment=False)}
    figure = draw_curves(runs)
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
    assert best_markers(figure) == list(best.values())


def test_the_earliest_of_equal_best_evaluations_is_marked_and_named():
    run = random_run()
    for line, value in zip([line for line in run if line["kind"] == "eval"], [61.2, 70.256, 70.256, 65], strict=True):
        line["oIoU"] = value
    figure = draw_curves({"demo": run})
    assert best_markers(figure) == [(100, 70.256)]
    assert figure.get_suptitle() == "demo (best oIoU 70.26, step 100)"
    assert figure.legends == []


def test_a_run_before_its_first_evaluation_and_without_alignment():
    run = [line for line in random_run(alignment=False) if line["kind"] == "train"]
    figure = draw_curves({"$a{$": run})
    assert set(panels(figure)) == set(TRAIN_PANELS) - {"Alignment"}
    assert figure.get_suptitle() == "$a{$"
    figure.draw_without_rendering()  # a name is not parsed as a formula


def test_single_points_are_visible():
    run = random_run(epochs=1)
    figure = draw_curves({"demo": run[4:]})  # one train line, one evaluation
    for title, axes in panels(figure).items():
        for line in curves(axes):
            assert len(line.get_xdata()) == 1
            assert line.get_marker() not in ("", "None"), title
    assert best_markers(figure) == [(50, run[-1]["oIoU"])]


@pytest.mark.parametrize(("low", "scale"), [(0.2, "log"), (0, "linear")])
def test_gradient_norms_have_a_log_scale_unless_all_are_zero(low, scale):
    run = [{**line, "grad_norm": low} for line in random_run()]
    assert panels(draw_curves({"demo": run}))["Gradient norm"].get_yscale() == scale


@pytest.mark.parametrize("count", [1, 3, 8])
def test_no_label_covers_another(count):
    runs = {f"refcoco_unc_base_{i}": random_run(i, epochs=40) for i in range(count)}
    for run in runs.values():
        for line in run:  # as many as in a published run, for the longest labels
            line["step"] *= 200
            line["lr"] = line.get("lr", 0) / 1e5
    figure = draw_curves(runs)
    figure.draw_without_rendering()
    names = figure.legends[0] if count > 1 else text_of(figure, figure.get_suptitle())
    boxes = {"names": names.get_window_extent()}
    boxes["steps"] = text_of(figure, "optimizer steps").get_window_extent()
    for title, axes in panels(figure).items():
        boxes[f"title of {title}"] = text_of(axes, title).get_window_extent()
        boxes[f"axes of {title}"] = axes.get_window_extent()
        boxes |= {
            f"{label.get_text()} of {title}": label.get_window_extent()
            for axis in (axes.xaxis, axes.yaxis)
            for label in axis.get_ticklabels()
            if axis.get_view_interval()[0] <= label.get_position()[axis is axes.yaxis] <= axis.get_view_interval()[1]
        }
        if axes.get_legend():
            boxes[f"legend of {title}"] = axes.get_legend().get_window_extent()
    names = list(boxes)
    for i, name in enumerate(names):
        assert boxes[name].x0 >= 0, name
        assert boxes[name].x1 <= figure.bbox.x1, name
        for other in names[:i]:
            assert not boxes[name].padded(-0.5).overlaps(boxes[other].padded(-0.5)), f"{name} covers {other}"


def test_the_png_is_written_beside_the_metrics_and_shows_the_curves(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "demo", random_run())
    run_main(monkeypatch, folder)
    assert capsys.readouterr().out == f"{folder / 'curves.png'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]
    with Image.open(folder / "curves.png") as image:
        assert (image.format, image.size) == ("PNG", (2240, 1000))
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    white = (pixels == 255).all(1).mean()
    assert 0.5 < white < 0.97
    for color in COLORS[:4]:
        rgb = [int(to_hex(color)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(1).sum() > 200, color


def test_a_metrics_file_as_run_and_another_output_path(tmp_path, monkeypatch):
    first = write(tmp_path / "first", random_run(1)) / "metrics.jsonl"
    second = write(tmp_path / "second", random_run(2)) / "metrics.jsonl"
    run_main(monkeypatch, first, second.parent, "--out", tmp_path / "new" / "both.png")
    with Image.open(tmp_path / "new" / "both.png") as image:
        assert image.format == "PNG"
    run_main(monkeypatch, first)
    assert (first.parent / "curves.png").exists()


def test_runs_of_equal_names_are_named_with_their_parents(tmp_path, monkeypatch):
    files = [tmp_path / name / "metrics.jsonl" for name in ("a/demo", "b/demo", "b/other")]
    assert run_names([*files, tmp_path / "kept.jsonl"]) == ["a/demo", "b/demo", "other", "kept.jsonl"]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "demo", random_run())
    assert run_names([find_metrics_file("a/demo/../demo/")]) == ["demo"]
    with pytest.raises(UserError, match=r"a/demo/metrics\.jsonl is given twice"):
        run_main(monkeypatch, "a/demo", tmp_path / "a" / "demo", "--out", "c.png")


def test_an_incomplete_last_line_is_left_out(tmp_path):
    run = random_run(epochs=1)
    text = write(tmp_path, run).joinpath("metrics.jsonl").read_text()
    last = len(json.dumps(run[-1]))
    for kept in range(last):
        (tmp_path / "metrics.jsonl").write_text(text[: len(text) - 1 - last + kept])
        assert read_metrics(tmp_path) == run[:-1], kept
    write(tmp_path, run, end="")
    assert read_metrics(tmp_path / "metrics.jsonl") == run
    (tmp_path / "metrics.jsonl").write_bytes(text.encode() + '{"kind": "é'.encode()[:-1])
    assert read_metrics(tmp_path) == run


def test_other_kinds_of_lines_and_missing_values(tmp_path):
    skipped = {"kind": "train", "step": 5, "epoch": 1, "samples_per_second": 3.0, "skipped": 5}
    run = [{"kind": "start", "step": "none"}, skipped, *random_run(epochs=1)]
    run[2]["note"] = "warm"
    run[3]["samples_per_second"] = None
    assert read_metrics(write(tmp_path, run)) == run
    shown = panels(draw_curves({"demo": run}))
    assert [step for step, _ in data(curves(shown["Loss"])[0])] == [10, 20, 30, 40, 50]
    assert [step for step, _ in data(curves(shown["Samples / s"])[0])] == [5, 10, 30, 40, 50]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "st', r"demo/metrics\.jsonl, line 2 is not JSON \(.*\)\. Remove the line\."),
        ("[1, 2]", r"demo/metrics\.jsonl, line 2 is not an object with a kind\. Remove the line\."),
        ('{"step": 3}', r"line 2 is not an object with a kind"),
        ('{"kind": ["train"], "step": 3}', r"line 2 is not an object with a kind"),
        ('{"kind": "train", "loss": 3}', r"line 2: step must be a number, not null\. Correct or remove the line\."),
        ('{"kind": "train", "step": 3, "loss": 1, "lr": "3e-5"}', r'line 2: lr must be a number, not "3e-5"'),
        ('{"kind": "eval", "step": 3, "oIoU": true}', r"line 2: oIoU must be a number, not true"),
    ],
)
def test_the_message_names_an_invalid_line_in_the_middle(tmp_path, line, message):
    lines = list(map(json.dumps, random_run(epochs=1)))
    write(tmp_path / "demo", [])
    (tmp_path / "demo" / "metrics.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_metrics(tmp_path / "demo")
    assert "\n" not in str(caught.value)


def test_missing_files_and_files_without_losses(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"There is no file .*nowhere. Give the folder of a run, such as models/<model_id>"
    ):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=rf"There is no file {tmp_path}/metrics\.jsonl\. Give the folder"):
        read_metrics(tmp_path)
    evaluations = [line for line in random_run() if line["kind"] == "eval"]
    for run in ([], evaluations, [{"kind": "train", "step": 10, "skipped": 10}]):
        with pytest.raises(UserError, match=r"metrics\.jsonl has no losses yet\. Wait until"):
            read_metrics(write(tmp_path, run))


def test_messages_of_mistakes(tmp_path, monkeypatch):
    first, second = (write(tmp_path / name, random_run()) for name in "ab")
    for arguments, message in (
        ((), "required: RUN. See --help."),
        ((first, second), "Several runs were given. Choose the file of their figure with --out FILE."),
        ((first, "--ouput", "c.png"), r"Unknown flag --ouput\. Did you mean --out\?"),
        ((first, "--ou", "c.png"), r"Unknown flag --ou\. Did you mean --out\?"),
        ((first, "--out", second), r"Cannot write .*b: it is a folder"),
        ((first, "--out", first / "metrics.jsonl" / "c.png"), r"Cannot write .*c\.png"),
        ((first, "--out", first / "metrics.jsonl"), r"Cannot write .*: the name must end in \.png"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(monkeypatch, *arguments)
    with pytest.raises(UserError, match=r"9 runs: a figure has colors for 8\. Give fewer\."):
        draw_curves({str(i): random_run(i) for i in range(9)})
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = write(tmp_path / "demo", random_run())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"Drawing needs matplotlib\. Run: pip install -r requirements-extra\.txt"):
        run_main(monkeypatch, folder)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(folder)) == 24


def test_the_command_needs_no_display_and_reports_mistakes_in_one_line(tmp_path):
    folder = write(tmp_path / "demo", random_run())
    code = (
        "import sys, lib.plot; assert 'matplotlib' not in sys.modules; lib.plot.main(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": {**PROCESS_ENVIRONMENT, "MPLBACKEND": "TkAgg"}}
    done = subprocess.run([sys.executable, "-c", code, folder], **options, check=False)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'curves.png'}\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "lib.plot", tmp_path / "nowhere"], **options, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: There is no file ")
    assert done.stderr.count("\n") == 1
