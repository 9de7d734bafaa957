"""No command replaces a file that it reads, or a file of another kind than its output.

The flags are read from the parsers: a new output flag is tried without any change here.
"""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import sys

import pytest
import torch
from commands import contents, run_in_process
from conftest import ROOT
from own_data import file_name, rows_by_mask, table
from PIL import Image
from test_layers import MODULES

from data.refshapes.dataset import write_refshapes
from lib import config
from lib.checkpoint import save_checkpoint

# Flags that take a text and are no file or folder. Add a new flag here, or with Parser.add_input or add_output.
TEXTS = {
    "--batch-sizes", "--check", "--commands", "--dataset", "--device", "--mha", "--mirror", "--model_id", "--name",
    "--precision_at", "--protocol", "--reference", "--sentence", "--split", "--splitBy", "--vis-color", "--vis-ids",
    "--weights", "--words",
}  # fmt: skip
DATASET = ("data/refshapes/instances.json", "data/refshapes/refs(unc).p", "data/refshapes/vocab.txt",
           "data/refshapes/images/another.png")  # fmt: skip
CONFIG = ("--cfg", "config.yaml", "--resume", "best.pth")
EVALUATION = (*CONFIG, "--split", "val")
# command → the flags that it needs, and files that it then reads
COMMANDS = {
    "test": (EVALUATION, ("best.pth", "config.yaml", "base.yaml", *DATASET)),
    "test --out": (
        (*CONFIG, "--image", "photo.png", "--sentence", "a circle"),
        ("best.pth", "config.yaml", "base.yaml", "photo.png", "data/refshapes/vocab.txt"),
    ),
    "test --table_dir": (
        ("--cfg", "config.yaml", "--table", "--checkpoints", "table.yaml"),
        ("best.pth", "config.yaml", "base.yaml", "table.yaml"),
    ),
    "train": (
        ("--cfg", "config.yaml", "--init_from", "best.pth", "--model_id", "run", "--epochs", "1"),
        ("best.pth", "config.yaml", "base.yaml", *DATASET),
    ),
    "lib.compare": (("comparison.yaml", "--seeds", "1"), ("comparison.yaml", "config.yaml", "base.yaml")),
    "lib.plot": (("run",), ("run/metrics.jsonl",)),
    "lib.rescore": (
        ("out.jsonl", "--ids", "ids.txt", "--gt_mask", "union", "--refer_data_root", "data", "--draws", "2"),
        ("out.jsonl", "out.jsonl.settings.json", "ids.txt", *DATASET[:2]),
    ),
    "refer.stats": (
        ("--dataset", "refshapes", "--refer_data_root", "data", "--bert_tokenizer", "data/refshapes/vocab.txt"),
        DATASET,
    ),
    "refer.prepare": (("--weights", "bert", "--from", "best.pth"), ("best.pth",)),
    "data.convert": (
        ("--name", "mine", "--sentences", "own/sentences.csv", "--images", "own/photos", "--masks", "own/masks",
         "--refer_data_root", "data"),
        ("own/sentences.csv", f"own/photos/{file_name(1)}", "own/masks/1/0.png"),
    ),
    "data.refshapes": ((), DATASET),
    "data.pack": (("--dataset", "refshapes", "--refer_data_root", "data", "--split", "val"), DATASET),
    "benchmarks.annotations": (("--bert_tokenizer", "data/refshapes/vocab.txt"), ("data/refshapes/vocab.txt",)),
    "benchmarks.curves": (("record.md",), ("record.md",)),
    "benchmarks.evaluation": (("--cfg", "config.yaml"), ("config.yaml", "base.yaml")),
    "benchmarks.data": (
        ("--dataset", "refshapes", "--refer_data_root", "data", "--bert_tokenizer", "data/refshapes/vocab.txt"),
        DATASET,
    ),
    "benchmarks.fuzz_annotations": ((), ()),
    "benchmarks.gpu": (("--device", "cpu", "--seconds", "0"), ()),
    "benchmarks.stress": ((), ()),
    "benchmarks.inference": (("--cfg", "config.yaml"), ("config.yaml", "base.yaml")),
    "benchmarks.startup": (("--compare", "record.md"), ("record.md",)),
    "benchmarks.training": (("--cfg", "config.yaml"), ("config.yaml", "base.yaml")),
}  # fmt: skip


def find_commands():
    """Return the modules that run a command, without ``__main__``."""
    return sorted(
        name.removesuffix(".__main__")
        for name, tree in MODULES.items()
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "run_command" for node in ast.walk(tree))
    )


def load(command):
    """Return a command's module and its parser."""
    if command in ("train", "test"):  # there is a package ``test`` in Python's library
        spec = importlib.util.spec_from_file_location(f"{command}_script", ROOT / f"{command}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, config.get_parser(command, "", module.add_arguments)
    main = f"{command}.__main__" if f"{command}.__main__" in MODULES else command
    module = importlib.import_module(main)
    return module, module.get_parser()


def names_of(action):
    return action.option_strings or [action.dest]


@pytest.fixture(scope="module")
def made_files(tmp_path_factory, made_source):
    """A folder with all files that the commands read."""
    from CrossVLT import build_crossvlt

    folder = tmp_path_factory.mktemp("files")
    write_refshapes(folder / "data", train_images=2, val_images=1, testA_images=1, testB_images=1)
    shutil.copytree(made_source, folder / "own")
    (folder / "own" / "sentences.csv").write_text(table(rows_by_mask()))
    small = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "text_dim": 32,
             "text_layers": 1, "text_heads": 2, "vocab_size": 200, "align_dim": 16}  # fmt: skip
    model = build_crossvlt("tiny", **small)
    for name in ("best.pth", "other.pth"):
        save_checkpoint(folder / name, {"model": model.state_dict(), "model_config": model.config})
    data = "{NAME: refshapes, ROOT: data, IMG_SIZE: 64}"
    network = {name.upper(): list(value) if isinstance(value, tuple) else value for name, value in small.items()}
    network = json.dumps({"SWIN_TYPE": "tiny", **network})
    (folder / "base.yaml").write_text(
        f"DATA: {data}\nMODEL: {network}\nPRETRAINED: {{TOKENIZER: data/refshapes/vocab.txt}}\n"
    )
    (folder / "config.yaml").write_text("_BASE_: base.yaml\nDEVICE: cpu\nWORKERS: 0\n")
    (folder / "table.yaml").write_text("refcoco: best.pth\n")
    (folder / "comparison.yaml").write_text("MODELS: {small: config.yaml}\n")
    for name in ("photo.png", DATASET[-1]):
        Image.new("RGB", (70, 50), "red").save(folder / name)
    (folder / "record.md").write_text("the record of a benchmark\n")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n' * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["test.py", *EVALUATION, "--predictions", "out.jsonl"])
        load("test")[0].main()
    sent_id = json.loads((folder / "out.jsonl").read_text().splitlines()[0])["sent_id"]
    (folder / "ids.txt").write_text(f"{sent_id}\n")
    return folder


@pytest.fixture
def files(made_files, tmp_path, monkeypatch):
    """A copy of the files; it is the current folder."""
    folder = shutil.copytree(made_files, tmp_path / "files")
    monkeypatch.chdir(folder)
    return folder


def test_every_command_is_tried():
    with_outputs = {command for command in find_commands() if load(command)[1].outputs}
    assert with_outputs == {name.split()[0] for name in COMMANDS}


@pytest.mark.parametrize("command", find_commands())
def test_every_flag_for_a_file_is_declared(command):
    parser = load(command)[1]
    declared = [*parser.inputs, *(action for action, _ in parser.outputs)]
    for action in parser._actions:
        takes_text = action.nargs != 0 and not action.choices and action.type not in (int, float)
        if takes_text and not action.dest.startswith("unused "):
            known = action in declared or TEXTS & set(names_of(action))
            assert known, f"{command} {names_of(action)}: add it with add_input or add_output if it is a path"


OUTPUTS = [
    (command, names_of(action)[0])
    for command in COMMANDS
    if " " not in command
    for action, _ in load(command)[1].outputs
]


@pytest.mark.parametrize(("command", "flag"), OUTPUTS)
def test_no_output_replaces_an_input(files, monkeypatch, capsys, command, flag):
    required, inputs = COMMANDS.get(f"{command} {flag}", COMMANDS[command])
    main = load(command)[0].main
    (files / "links").mkdir()
    paths = ["other.pth"]
    for number, name in enumerate(inputs):
        symbolic, hard = files / "links" / f"{number}a.png", files / "links" / f"{number}b.png"
        symbolic.symlink_to(files / name)
        hard.hardlink_to(files / name)
        paths += [name, files / name, symbolic, hard]
    before = contents(files)
    for path in paths:
        done = run_in_process(main, [command, *required, flag, path], monkeypatch, capsys)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert (done.status, len(errors)) == (2, 1), (path, done)
        assert str(path) in errors[0]
        assert "Traceback" not in done.err
        assert {name: content for name, content in contents(files).items() if name in before} == before, path
    assert all(path.is_symlink() for path in (files / "links").glob("*a.png"))


def test_the_message_names_the_input(files, monkeypatch, capsys):
    (files / "link").hardlink_to("best.pth")
    main = load("test")[0].main
    for path, message in (
        ("best.pth", "it is one of the input files. Choose another name."),
        (DATASET[0], "it exists and is a JSON object, not a JSON list. Choose another name."),
        ("link", f"it is one of the input files, {files}/best.pth, under another name. Choose another name."),
        ("other.pth", "it exists and is a binary file, not a JSON list. Choose another name."),
        ("out.jsonl", "it exists and is a file of JSON lines, not a JSON list. Choose another name."),
    ):
        done = run_in_process(main, ["test.py", *EVALUATION, "--json", path], monkeypatch, capsys)
        assert done.err.splitlines()[-1] == f"error: Cannot write {path}: {message}"
    required, _ = COMMANDS["refer.stats"]
    for flag, path, reason in (
        ("--json", DATASET[0], "it is one of the input files"),
        ("--out", DATASET[3], "it is one of the input files"),
    ):
        done = run_in_process(load("refer.stats")[0].main, ["stats", *required, flag, path], monkeypatch, capsys)
        assert f"error: Cannot write {path}: {reason}" in done.err


def test_a_training_replaces_neither_its_configuration_nor_its_initial_weights(files, monkeypatch, capsys):
    """A run that is resumed may replace its own files, though it has read them."""
    main = load("train")[0].main
    flags = ["train.py", "--output-dir", "checkpoints", "--log_dir", "models", "--model_id", "run", "-b", "4"]
    new = ["--cfg", "models/run/config.yaml", "--init_from", "best.pth", "--steps", "1"]
    (files / "models" / "run").mkdir(parents=True)
    shutil.copy(files / "base.yaml", files / "models" / "run" / "config.yaml")
    before = contents(files)
    done = run_in_process(main, [*flags, *new], monkeypatch, capsys)
    assert "Cannot write models/run/config.yaml: it is one of the input files" in done.err.splitlines()[-1]
    assert {name: content for name, content in contents(files).items() if name in before} == before

    (files / "models" / "run" / "config.yaml").rename(files / "first.yaml")
    done = run_in_process(main, [*flags, "--cfg", "first.yaml", *new[2:]], monkeypatch, capsys)
    assert done.status == 0, done.err
    own = ["--cfg", "models/run/config.yaml", "--resume", "checkpoints/run/last.pth", "--steps", "2"]
    done = run_in_process(main, [*flags, *own], monkeypatch, capsys)
    assert done.status == 0, done.err
    assert torch.load("checkpoints/run/last.pth", weights_only=True)["step"] == 2


def calls_outside_of_safe_blocks(node):
    """Yield the calls in a syntax tree that are not in a ``with`` block of atomic_write or the like."""
    if isinstance(node, ast.With):
        managers = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if any(ast.unparse(manager.func).split(".")[-1] in SAFE_BLOCKS for manager in managers):
            return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_outside_of_safe_blocks(child)


SAFE_BLOCKS = {"atomic_write", "atomic_folder", "TemporaryDirectory"}
METHODS = {"write_text", "write_bytes", "savefig", "save_file", "copyfile", "symlink_to", "hardlink_to"}
FUNCTIONS = {"torch.save", "json.dump", "pickle.dump", "np.save", "os.replace", "os.rename", "os.link", "os.symlink"}
# Modules that write only temporary files and folders, or keep what they replace.
EXEMPT = {
    "lib.files", "data.convert.dataset", "data.refshapes.dataset", "refer.prepare.archives",
    "refer.prepare.download", "refer.prepare.files", "refer.prepare.install", "benchmarks.annotations.generate",
    "benchmarks.generated_split", "benchmarks.fuzz_annotations.run", "benchmarks.gpu.checks",
    "benchmarks.stress.runs",
}  # fmt: skip


def writes(call):
    """Return whether a call can write a file, according to its name and its mode."""
    name = ast.unparse(call.func)
    constants = [getattr(value, "value", None) for value in (*call.args, *(item.value for item in call.keywords))]
    if name.split(".")[-1] == "open":
        return any(isinstance(mode, str) and re.fullmatch("[rbt]*[wax+][bt+]*", mode) for mode in constants)
    is_image = name.endswith(".save") and ast.unparse(call.func.value) in ("image", "figure", "pixels", "Image")
    is_method = isinstance(call.func, ast.Attribute) and call.func.attr in METHODS
    return is_image or is_method or name in FUNCTIONS


@pytest.mark.parametrize("name", [name for name in MODULES if name not in EXEMPT])
def test_files_are_written_through_lib_files(name):
    for call in calls_outside_of_safe_blocks(MODULES[name]):
        assert not writes(call), f"{name}:{call.lineno} writes a file. Use a function of lib/files.py"


def test_the_exemptions_are_needed():
    for name in EXEMPT:
        assert any(map(writes, calls_outside_of_safe_blocks(MODULES[name]))), name
