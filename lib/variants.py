"""Names and sizes of the published models. Other modules import them from here. Imports no torch."""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

IMG_SIZE = 480  # pixels per side of the resized square image
MAX_TOKENS = 21  # token ids per sentence, [CLS] and [SEP] included
BERT = "bert-base-uncased"
BERT_VOCAB_SIZE = 30522
NO_FILE = "none"  # value of the flags that name pretrained files: start this encoder from random weights
NUM_STAGES = 4  # of either encoder
# The weights released by the authors: a public Google Drive folder and, by dataset, the names of the files in it.
RELEASED_URL = "https://drive.google.com/drive/folders/1zEAuhntMjH13rhzSYibw_xXLvp-4xB_v"
RELEASED_FILES = {name: f"best_{name}.pth" for name in ("refcoco", "refcoco+", "refcocog")}
RELEASED_HINT = (  # for messages about a missing checkpoint
    f"The authors' weights ({', '.join(RELEASED_FILES.values())}) are installed in checkpoints/ by `python -m "
    f"refer.prepare --weights crossvlt`, or by hand: open {RELEASED_URL} in a browser and download these files."
)
MASK_MODES = ("paper", "union")  # how target masks are rasterized; see refer.masks
EVAL_SIZES = ("resized", "original")  # at which size masks are compared; see lib.protocols

# The Swin encoders. ``pretrained`` is the ImageNet file, whose window is used by default.
SWIN_VARIANTS = {
    "tiny": {
        "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7,
        "pretrained": "swin_tiny_patch4_window7_224.pth",
    },
    "small": {
        "embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window_size": 7,
        "pretrained": "swin_small_patch4_window7_224.pth",
    },
    "base": {
        "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window_size": 12,
        "pretrained": "swin_base_patch4_window12_384_22k.pth",
    },
    "large": {
        "embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12,
        "pretrained": "swin_large_patch4_window12_384_22k.pth",
    },
}  # fmt: skip

# Fusions: (vision-to-language attention, language-to-vision fusion in stages 1 to 3). The last stage always fuses
# language into vision. "vision" and "late" are the paper's ablations.
FUSIONS = {
    "cross": (True, True),  # published
    "vision": (False, True),
    "late": (False, False),
}

# Smallest and largest value of each integer argument of build_crossvlt. The largest ones are far beyond all known
# models; without them, a wrong value could take unlimited memory or time.
SIZE_RANGES = {
    "window_size": (2, 1024),
    "embed_dim": (1, 4096),
    "depths": (1, 1000),
    "num_heads": (1, 4096),
    "text_dim": (1, 16384),
    "text_layers": (1, 1000),
    "text_heads": (1, 1024),
    "vocab_size": (1, 10_000_000),
    "align_dim": (1, 16384),
}


def complete_sizes(swin_type: str, **sizes: Any) -> dict[str, Any]:
    """Return the sizes of a network; those that are None have the values of the Swin type.

    Args:
        swin_type: a name in ``SWIN_VARIANTS``.
        sizes: names in ``SIZE_RANGES`` with values. ``embed_dim`` and ``num_heads`` must be among them.

    Raises:
        ValueError: an unknown Swin type, a size that is no integer or outside its range, or sizes that do not fit each
            other.
    """
    if swin_type not in SWIN_VARIANTS:
        raise ValueError(f"swin_type must be one of {', '.join(SWIN_VARIANTS)}, not {swin_type!r}.")
    complete = {}
    for name, size in sizes.items():
        size = SWIN_VARIANTS[swin_type].get(name) if size is None else size
        smallest, largest = SIZE_RANGES[name]
        per_stage = name in ("depths", "num_heads")
        if per_stage and len(size) != NUM_STAGES:
            raise ValueError(f"{name} must have {NUM_STAGES} entries, not {reprlib.repr(size)}.")
        if not all(type(item) is int and smallest <= item <= largest for item in (size if per_stage else [size])):
            kind = "integers" if per_stage else "an integer"
            raise ValueError(f"{name} must be {kind} from {smallest} to {largest}, not {reprlib.repr(size)}.")
        complete[name] = list(size) if per_stage else size
    for i, heads in enumerate(complete["num_heads"]):
        channels = complete["embed_dim"] * 2**i
        if channels % heads:
            raise ValueError(f"The {channels} channels of stage {i} cannot be divided into {heads} equal heads.")
    return complete


def check_rates(**rates: float) -> None:
    """Raise a ValueError unless all rates of dropout are at least 0 and below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {rate}.")


def drop_path_rates(largest: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop path rates of the blocks of each stage. They increase linearly from 0 in the first block."""
    rates = [largest * k / max(1, sum(depths) - 1) for k in range(sum(depths))]
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


class ModelFacts(NamedTuple):
    """What configuration and commands know about a network without importing it."""

    title: str  # name in messages
    protocol: str  # name of the published protocol, see lib.protocols
    defaults: dict[str, Any]  # published values of configuration keys where they differ from those in lib/options.py


# ``lavt`` and ``lavt_one`` are the same network with the settings of LAVT's two published trainings.
_LAVT_SETTINGS = {
    "DATA.MAX_TOKENS": 20, "MODEL.TEXT_LAYERS": 12, "TRAIN.LR": 5e-5, "TRAIN.SEGMENTATION_WEIGHT": 1.0,
    "TRAIN.ALIGNMENT": False,
}  # fmt: skip
# The networks of --model. A new one also needs an entry in NETWORKS (lib/models.py).
MODELS = {
    "crossvlt": ModelFacts("CrossVLT", "paper", {}),
    "lavt": ModelFacts("LAVT", "lavt", {**_LAVT_SETTINGS, "MODEL.TEXT_DROPOUT": 0.0}),
    "lavt_one": ModelFacts("LAVT", "lavt", _LAVT_SETTINGS),
    # Trained as CrossVLT, so that only the network differs.
    "vlt": ModelFacts("the VLT-style network", "paper", {"MODEL.TEXT_LAYERS": 12, "TRAIN.ALIGNMENT": False}),
}
