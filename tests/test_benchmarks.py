"""The benchmarks, on sizes that take seconds, in this process."""

import sys

import pytest

from benchmarks import curves, data, evaluation, inference, machine, records, startup, training
from benchmarks.annotations.__main__ import main as annotations_main
from benchmarks.annotations.generate import Size as AnnotationsSize
from benchmarks.annotations.generate import generate_dataset
from benchmarks.generated_split import Size, open_set, write_set
from lib.errors import UserError
from refer.refer import REFER


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark on a tiny network, return its output, and that as {column: cell} for each row of the table."""
    monkeypatch.setattr(machine, "run_in_process", lambda function, *args: function(*args))
    for name, value in {"LINEAR_ROWS": 16, "LINEAR_SIZES": ((8, 8),), "CONV_CHANNELS": 4, "CONV_SIZE": 8}.items():
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(machine, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(machine, "REPEAT_SECONDS", 1e-9)
    (tmp_path / "tiny.yaml").write_text(
        "DATA: {IMG_SIZE: 64}\nDEVICE: cpu\nMODEL: {SWIN_TYPE: tiny, DEPTHS: [2, 2, 2, 2], WINDOW_SIZE: 4,\n"
        "  EMBED_DIM: 16, NUM_HEADS: [1, 2, 2, 4], TEXT_DIM: 32, TEXT_LAYERS: 2, TEXT_HEADS: 2,\n"
        "  VOCAB_SIZE: 60, ALIGN_DIM: 16}\n"
    )

    def run(benchmark, *flags):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags)])
        benchmark.main()
        return capsys.readouterr().out

    return run


def tiny(tmp_path, *flags):
    return ("--cfg", tmp_path / "tiny.yaml", "--repeats", 2, *flags)


def table(text):
    """Return the rows of a Markdown table as {column: cell}."""
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_inference_measures_each_batch_and_shared_images(run, tmp_path):
    out = tmp_path / "out.md"
    rows = table(run(inference, *tiny(tmp_path, "--models", "plain", "--amp", "off", "--out", out)))
    assert [(row["batch"], row["sentences per image"]) for row in rows] == [("1", "1"), ("3", "1"), ("3", "3")]
    single, batch, shared = (float(row["GFLOP"]) for row in rows)
    assert single == batch > shared > 0  # the first vision stage is computed once
    assert all(row["share of the matrix rate"].endswith(" %") for row in rows)
    (record,) = records.read_records(out)
    assert [len(row.rates) for row in record.rows] == [2, 2, 2]

    again = table(run(inference, *tiny(tmp_path, "--models", "plain", "--batch-sizes", 1, "--compare", out)))
    assert [(row["amp"], bool(row["speed-up"])) for row in again] == [("off", True), ("bf16", False)]


def test_training_reports_the_memory_that_checkpointing_saves(run, tmp_path):
    rows = table(run(training, *tiny(tmp_path, "--amp", "bf16", "--grad_checkpoint", "--batch-sizes", 1)))
    assert [(row["amp"], row["gradient checkpointing"]) for row in rows] == [("bf16", "no"), ("bf16", "yes")]
    without, checkpointed = (float(row["kept for backward"].split()[0]) for row in rows)
    assert 0 < checkpointed < 0.5 * without


def test_data_compares_image_files_with_a_packed_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "GENERATED", (2, 3, 7))
    monkeypatch.setattr(data, "WINDOW_SECONDS", 0.01)
    rows = table(run(data, "--img_size", 64, "--workers", 0, 1, "--repeats", 2))
    assert [(row["source"], row["workers"]) for row in rows] == [
        (source, workers) for workers in "01" for source in ("image files", "packed")
    ]
    assert [row["speed ÷ image files"] == "1.0× (1.0…1.0)" for row in rows] == [True, False, True, False]
    rows = table(run(data, "--img_size", 64, "--filters", "--repeats", 1))
    assert {row["layout or filter"]: row["size"] for row in rows}["contiguous"].startswith("10")  # and a header
    with pytest.raises(UserError, match="--workers must be at least 0"):
        run(data, "--workers", -1)


def test_the_speed_up_is_the_earlier_time_divided_by_the_new_one():
    row = {"case": {"batch": 2}, "count": 2, "gflop": 60, "kernel": "float32 linear", "rates": [10, 20, 10]}
    earlier, new = (
        records.Record("x", "X", "a machine", "sample", [records.Row(seconds=seconds, **row)])
        for seconds in ([12, 8, 20], [5, 6, 4])
    )
    (cells,) = table(new.to_markdown(earlier))
    assert cells["speed-up"] == "2.40×"
    assert cells["time per sample"] == "2.5 s (2 s…3 s)"
    assert cells["share of the matrix rate"] == "120 %"  # the median of 60/5/10, 60/6/20 and 60/4/10
    assert "Matrix rate: float32 linear 10 (10…20) GFLOP/s" in new.to_markdown()
    assert "speed-up" not in new.to_markdown()


def test_invalid_flags_and_records_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="--sentences must divide"):
        run(inference, *tiny(tmp_path, "--batch-sizes", 2, "--sentences", 3))
    with pytest.raises(UserError, match="--batch-sizes must be at least 1"):
        run(training, *tiny(tmp_path, "--batch-sizes", 0))
    with pytest.raises(UserError, match="--gpu_memory limits the memory of a GPU"):
        run(training, *tiny(tmp_path, "--gpu_memory", 24))
    record = tmp_path / "record.md"
    record.write_text("no table\n")
    with pytest.raises(UserError, match="contains no record"):
        run(training, *tiny(tmp_path, "--compare", record))
    record.write_text('```json\n{"rows": []}\n```\n')
    with pytest.raises(UserError, match="is damaged"):
        run(training, *tiny(tmp_path, "--compare", record))


def test_evaluation_evaluates_the_generated_split_in_each_repeat(run, tmp_path):
    flags = ("--models", "plain", "--amp", "off", "--images", 2, "--sources", "files", "packed")
    rows = table(run(evaluation, *tiny(tmp_path, *flags)))
    assert [row["images"] for row in rows] == ["files", "packed"]
    assert float(rows[0]["GFLOP"]) > 0
    assert float(rows[0]["at the end"].split()[0]) > 0
    with pytest.raises(UserError, match="--images and --batch-sizes must be at least 1"):
        run(evaluation, *tiny(tmp_path, "--images", 0))


def test_startup_measures_help_and_a_usage_error(run, monkeypatch):
    calls = []
    monkeypatch.setattr(startup, "time_command", lambda command, status: calls.append((command[1:], status)) or 1.0)
    rows = table(run(startup, "--repeats", 1, "--commands", "train.py", "lib.plot"))
    assert [(row["command"], row["flag"]) for row in rows] == [
        (command, flag) for command in ("train.py", "lib.plot") for flag in ("--help", "--no_such_flag")
    ]
    assert calls[::2] == [
        (["train.py", "--help"], 0),
        (["train.py", "--no_such_flag"], 2),
        (["-m", "lib.plot", "--help"], 0),
        (["-m", "lib.plot", "--no_such_flag"], 2),
    ]
    with pytest.raises(UserError, match=r"no such command 'train'\. Did you mean train\.py\?"):
        run(startup, "--commands", "train")


def test_curves_draws_what_inference_measured(run, tmp_path):
    cases = [(32, 1, 1), (64, 1, 1), (64, 2, 1), (64, 2, 2)]
    rows = [
        records.Row(
            {"model": "plain", "amp": "off", "image size": size, "batch": batch, "sentences per image": n}, [1.0]
        )
        for size, batch, n in cases
    ]
    record, image = tmp_path / "record.md", tmp_path / "curves.png"
    records.finish(records.Record("inference", "X", "a machine", rows=rows), None, record)
    columns = [sorted(panel.points) for panel in curves.panels(rows)]
    assert columns == [[32, 64], [1, 2], [1, 2]]
    run(curves, record, "--out", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    records.finish(records.Record("training", "X", "a machine", rows=rows), None, record)
    with pytest.raises(UserError, match=r"no record of benchmarks\.inference --curves"):
        run(curves, record, "--out", image)


def test_annotations_reports_loading_times_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["annotations", "--share", "0.005", "--workers", "2", "--repeats", "1"])
    annotations_main()
    out = capsys.readouterr().out
    assert out.startswith("212 refs, 603 expressions, 836 annotations, ")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[1:4] == ["read and index", "select, tokenize, pack", "both"]
    assert rows[-2:] == ["ReferDataset", "records of REFER"]
    monkeypatch.setattr(sys, "argv", ["annotations", "--share", "0"])
    with pytest.raises(UserError, match="large enough for 2 batches per worker"):
        annotations_main()


def test_generated_annotations_have_the_requested_size(tmp_path):
    generate_dataset(tmp_path, AnnotationsSize(50, 500, 120, 340))
    refer = REFER(tmp_path)
    sentences = [sentence["raw"] for ref in refer.data["refs"] for sentence in ref["sentences"]]
    assert (len(refer.Refs), len(sentences), len(refer.Imgs), len(refer.Anns)) == (120, 340, 50, 500)
    assert 0.6 < len(set(sentences)) / len(sentences) < 0.95  # some sentences are repeated, as in RefCOCO
    assert min(refer.getMask(ref_id)["area"] for ref_id in refer.Refs) > 0


def test_the_generated_split_has_the_requested_size(tmp_path):
    write_set(tmp_path, Size(7, 19, 53))
    dataset = open_set(tmp_path, 64)
    assert len(dataset) == 53
    assert len({e.ref_id for e in dataset.expressions}) == 19
    assert len({e.image_id for e in dataset.expressions}) == 7
