"""Fixtures and constants shared by the tests."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # the helper modules of the tests, such as golden_cases
os.environ["HF_HUB_OFFLINE"] = "1"  # tests do not use the Hub or its cache
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir(), "no_hub_cache"))
for cache in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(cache, None)
for name in ("no_proxy", "NO_PROXY"):  # the servers of the tests run on this machine
    os.environ[name] = "127.0.0.1,localhost"

from commands import run_in_process  # noqa: E402
from own_data import made_source, source  # noqa: E402, F401  (fixtures)
from published_set import annotations, image_files, prepare, server, weights  # noqa: E402, F401  (fixtures)
from result_files import run_rescore  # noqa: E402, F401  (fixtures)

# Environment of processes started by tests. Sums are rounded identically only with the same number of threads.
PROCESS_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# The slowest files run first, so that neither of the two processes of `make test` is idle at the end.
LONGEST = ("test_training_runs", "test_crossvlt", "test_evaluating", "test_train_and_test", "test_lib_engine_loop")

SMALL = {
    "embed_dim": 32,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": 4,
    "text_dim": 32,
    "text_layers": 1,
    "text_heads": 2,
    "vocab_size": 60,
    "align_dim": 16,
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread, which is fastest for small tensors and also set by torchrun. Return the initial number."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # commands that run in this process keep the number
    return num_threads


@pytest.fixture(autouse=True)
def restored_logging():
    """Undo the logging set-up of commands that a test runs in this process."""
    from utils import LOGGER

    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers.clear()  # session fixtures have set up logging, too
    yield
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before


@pytest.fixture
def crossvlt_log(monkeypatch):
    """Let caplog see the project's log lines."""
    from utils import LOGGER

    monkeypatch.setattr(LOGGER, "propagate", True)


@pytest.fixture
def all_threads(one_thread):
    """Use all threads, for models of the published size."""
    torch.set_num_threads(one_thread)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def small_model():
    """Return a function that builds a small CrossVLT: ``small_model(fusion=…)``."""
    from CrossVLT import build_crossvlt

    def build(**changes):
        torch.manual_seed(0)
        return build_crossvlt("tiny", **{**SMALL, **changes})

    return build


@pytest.fixture
def small_inputs():
    """Return a function that makes images, token ids, attention mask and target masks of random values."""

    def make(batch=2, height=64, width=64, tokens=7, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, height, width, generator=generator).to(dtype)
        attention_mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (batch, 1), generator=generator)).long()
        input_ids = torch.randint(1, SMALL["vocab_size"], (batch, tokens), generator=generator) * attention_mask
        masks = (torch.rand(batch, height, width, generator=generator) < 0.3).long()
        return images, input_ids, attention_mask, masks

    return make


@pytest.fixture(scope="session")
def refshapes_root(tmp_path_factory):
    """A data root with a small RefShapes dataset."""
    from data.refshapes.dataset import write_refshapes

    root = tmp_path_factory.mktemp("data")
    write_refshapes(root, train_images=24, val_images=7, testA_images=3, testB_images=3)
    return root


@pytest.fixture(scope="session")
def small_config(tmp_path_factory, refshapes_root):
    """A YAML file of a CrossVLT that trains in seconds on the small RefShapes dataset."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(
        f"""
DATA: {{NAME: refshapes, IMG_SIZE: 64, ROOT: "{refshapes_root}"}}
MODEL: {{SWIN_TYPE: tiny, WINDOW_SIZE: 4, EMBED_DIM: 32, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 2, 4, 8],
        TEXT_DIM: 32, TEXT_LAYERS: 1, TEXT_HEADS: 2, VOCAB_SIZE: 200, ALIGN_DIM: 16}}
PRETRAINED: {{FROM_SCRATCH: true}}
TRAIN: {{LR: 1.0e-3, CLIP_GRAD: 1.0}}
BATCH_SIZE: 4
WORKERS: 0
DEVICE: cpu
"""
    )
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_config):
    """Train two epochs with two processes; return the folder and the finished process."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
         "--cfg", small_config, "--epochs", "2", "--print-freq", "2", "--model_id", "run",
         "--output-dir", folder / "checkpoints", "--log_dir", folder / "models"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=PROCESS_ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Return a function that runs train.py or test.py in this process: ``run_here("test.py", "--flag", …)``."""

    def run(script, *flags, check=False):
        spec = importlib.util.spec_from_file_location(f"{script[:-3]}_script", ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        finished = run_in_process(module.main, [script, *flags], monkeypatch, capsys)
        assert not check or finished.status == 0, finished.err
        return finished

    return run


@pytest.fixture
def error_line(trained, small_config, refshapes_root, tmp_path, monkeypatch, run_here):
    """Run a command with a user's mistake and return its error message: ``error_line("test.py", "--flag", …)``.

    The command must exit with status 2 and change no checkpoint. Flags may contain {best}, {last}, {cfg}, {data},
    {checkpoints} and {tmp}; the folder {tmp} has a file corrupt.pth and vocabularies of other sizes.
    """
    checkpoints = trained[0] / "checkpoints"
    (tmp_path / "corrupt.pth").write_bytes(b"no checkpoint")
    (tmp_path / "a.png").write_bytes(b"not an image; never opened")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for name, words in (("big", 295), ("other", 94)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(special + [f"w{i}" for i in range(words)]))
    paths = {"best": checkpoints / "run/best.pth", "last": checkpoints / "run/last.pth", "tmp": tmp_path,
              "cfg": small_config, "checkpoints": checkpoints, "data": refshapes_root}  # fmt: skip

    def files_below(folder):
        return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())

    def run(script, *flags):
        arguments = [flag.format(**paths) for flag in flags]
        if script == "train.py" and "--output-dir" not in arguments:
            arguments += ["--output-dir", str(tmp_path / "checkpoints")]
        before = files_below(checkpoints)
        monkeypatch.chdir(tmp_path)  # without the pretrained files and data of the checkout
        done = run_here(script, *arguments)
        assert done.status == 2
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "Traceback" not in done.err
        assert files_below(checkpoints) == before
        return lines[0]

    return run


@pytest.fixture
def run_script(tmp_path):
    """Run train.py or test.py as a user does: ``run_script("train.py", "--flag", …, processes=2)``.

    Checkpoints are written to ``tmp_path``. Return the finished process with its output.
    """

    def run(script, *flags, processes=1, launcher="torchrun", check=True, timeout=300):
        command = [sys.executable]
        if processes > 1:
            if launcher == "torchrun":
                command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            else:
                with socket.socket() as free:
                    free.bind(("localhost", 0))
                    port = free.getsockname()[1]
                command += ["-m", "torch.distributed.launch", "--nproc_per_node", str(processes)]
                command += ["--master_port", str(port)]
        command += [script, *map(str, flags)]
        if script == "train.py":
            command += ["--output-dir", str(tmp_path / "checkpoints")]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=PROCESS_ENVIRONMENT, check=False
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
