"""What several test files share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as golden_cases
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the hub

# Of every process a test starts: sums are rounded alike only by the same number of threads.
PROCESS_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

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


@pytest.fixture
def small_model():
    """Build a small CrossVLT: ``small_model(fusion=…)``."""
    from CrossVLT import build_crossvlt

    def build(**changes):
        torch.manual_seed(0)
        return build_crossvlt("tiny", **{**SMALL, **changes})

    return build


@pytest.fixture
def small_inputs():
    """Pictures, ids, text mask and object masks for a small model: ``small_inputs(batch, height, width)``."""

    def make(batch=2, height=64, width=64, tokens=7, dtype=torch.float32):
        source = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, height, width, generator=source).to(dtype)
        attention_mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (batch, 1), generator=source)).long()
        input_ids = torch.randint(1, SMALL["vocab_size"], (batch, tokens), generator=source) * attention_mask
        masks = (torch.rand(batch, height, width, generator=source) < 0.3).long()
        return images, input_ids, attention_mask, masks

    return make


@pytest.fixture(scope="session")
def refshapes_root(tmp_path_factory):
    """A data root with a small RefShapes set."""
    from data.refshapes import write_refshapes

    root = tmp_path_factory.mktemp("data")
    write_refshapes(root, train_images=24, val_images=7, testA_images=3, testB_images=3)
    return root


@pytest.fixture(scope="session")
def small_config(tmp_path_factory, refshapes_root):
    """A yaml for a CrossVLT that trains in seconds on the small RefShapes set."""
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


@pytest.fixture
def run_script(tmp_path):
    """Run train.py or test.py as a user does: ``run_script("train.py", "--flag", …, processes=2)``.

    Outputs land in ``tmp_path``; gives back the finished process with its text.
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
