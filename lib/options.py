"""All options of train.py and test.py, each described once.

lib/config.py generates the defaults, the flags, the range checks and docs/options.md from ``OPTIONS``. A new option is
one entry here and the code that uses it.
"""

import math
from dataclasses import dataclass
from typing import Any

from lib.errors import UserError
from lib.variants import (
    BERT,
    BERT_VOCAB_SIZE,
    FUSIONS,
    IMG_SIZE,
    MAX_TOKENS,
    MODELS,
    NO_FILE,
    RELEASED_HINT,
    SWIN_VARIANTS,
)
from refer.datasets import ROOT

MIN_IMAGE_SIZE = 33  # in the last stage, smaller images have a single position
MAX_POSITIONS = 512  # position embeddings of BERT
BOTH = ("train", "test")


@dataclass(frozen=True)
class Option:
    """One configuration key.

    Args:
        key: dotted name in a YAML file, e.g. ``TRAIN.LR``.
        default: also determines the type.
        help: one line for ``--help`` and docs/options.md.
        flags: command-line flags that set the key, separated by spaces. Without flags, only a YAML file can set it.
        scripts: the scripts that use it, ``train`` and ``test``.
        choices: the allowed values.
        above, at_least, below, at_most: the allowed range of a number.
        may_change_on_resume: whether a resumed run may change it. The others keep the values saved in the checkpoint.
        constant: the value that a flag without argument sets (booleans have ``--x`` and ``--no-x`` instead).
        metavar: placeholder of the flag's argument.
        item: type of the items of a list; its flag can be repeated.
        path: ``input`` or ``output`` if the value names a file or folder that is read or written.
        hint: where to get a file that must exist, for the message that it does not.
        models: the networks (MODEL.NAME) that it applies to; empty: all.
    """

    key: str
    default: Any
    help: str
    flags: str = ""
    scripts: tuple[str, ...] = ("train",)
    choices: tuple[str, ...] | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    may_change_on_resume: bool = False
    constant: Any = None
    metavar: str | None = None
    item: type = int
    path: str = ""
    hint: str = ""
    models: tuple[str, ...] = ()

    @property
    def flag_names(self) -> tuple[str, ...]:
        return tuple(self.flags.split())

    def applies_to(self, model: str) -> bool:
        """Return whether the network ``model`` has this setting."""
        return not self.models or model in self.models

    def default_of(self, model: str) -> Any:
        """Return the published value for the network ``model``."""
        return MODELS[model].defaults.get(self.key, self.default)

    def check(self, value: Any, name: str) -> None:
        """Raise a UserError that begins with ``name`` if the value is not allowed."""
        if self.choices and value not in self.choices:
            raise UserError(f"{name} {value!r}: choose one of {', '.join(self.choices)}.")
        for allowed, limit in (
            (self.above is None or value > self.above, f"above {self.above}"),
            (self.at_least is None or value >= self.at_least, f"at least {self.at_least}"),
            (self.below is None or value < self.below, f"below {self.below}"),
            (self.at_most is None or value <= self.at_most, f"at most {self.at_most}"),
            (not isinstance(value, float) or math.isfinite(value), "a finite number"),
        ):
            if not allowed:
                raise UserError(f"{name} {value}: must be {limit}.")


# In DATA, MODEL and PRETRAINED, an empty value (0, "", []) means: the published value, or that of the checkpoint.
OPTIONS = (
    # Data
    Option(
        "DATA.NAME",
        "refcoco",
        "name of the dataset; for train.py also several (a,b,c): training uses their union without the images of any "
        "evaluation split, validation the first dataset",
        "--dataset",
        BOTH,
    ),
    Option(
        "DATA.SPLIT_BY",
        "",
        "split system, required for refcocog: umd or google (default: unc, or the only one that the dataset has); "
        "several datasets: one each (a,b,c)",
        "--splitBy",
        BOTH,
    ),
    Option(
        "DATA.SPLIT", "val", "split to validate on; for test.py: splits to evaluate (val,testA or all)", "--split", BOTH
    ),
    Option(
        "DATA.ROOT",
        f"./{ROOT}",
        "folder of the datasets",
        "--refer_data_root",
        BOTH,
        may_change_on_resume=True,
        metavar="DIR",
        path="input",
    ),
    Option(
        "DATA.PACKED",
        [],
        "packed file of a split (python -m data.pack) to read instead of the image files; repeat the flag for further "
        "splits ('': none)",
        "--packed",
        BOTH,
        may_change_on_resume=True,
        metavar="FILE",
        item=str,
        path="input",
    ),
    Option(
        "DATA.IMG_SIZE",
        IMG_SIZE,
        "side of the square to which images are resized (test.py: as in training)",
        "--img_size",
        BOTH,
        at_least=MIN_IMAGE_SIZE,
    ),
    Option(
        "DATA.MAX_TOKENS",
        MAX_TOKENS,
        "token ids per sentence, [CLS] and [SEP] included (test.py: as in training)",
        "--max_tokens",
        BOTH,
        above=0,
        at_most=MAX_POSITIONS,
    ),
    # Model
    Option(
        "MODEL.NAME",
        "crossvlt",
        "the network (test.py: read from the checkpoint); it determines the defaults of other options",
        "--model",
        BOTH,
        choices=tuple(MODELS),
    ),
    Option(
        "MODEL.SWIN_TYPE",
        "base",
        "size of the Swin encoder (test.py: read from the checkpoint)",
        "--swin_type",
        BOTH,
        choices=tuple(SWIN_VARIANTS),
    ),
    Option(
        "MODEL.WINDOW_SIZE",
        0,
        "Swin window of 12 (default: the window of the pretrained file)",
        "--window12",
        BOTH,
        at_least=0,
        constant=12,
    ),
    Option(
        "MODEL.FUSION",
        "cross",
        "direction of early fusion: cross (published), vision or late (ablations)",
        "--fusion",
        choices=tuple(FUSIONS),
        models=("crossvlt",),
    ),
    Option(
        "MODEL.MHA",
        "",
        "heads of LAVT's fusion in the four stages, such as 2-4-8-16 (default: 1-1-1-1, or those of --init_from)",
        "--mha",
        metavar="A-B-C-D",
        models=("lavt", "lavt_one"),
    ),
    Option(
        "MODEL.FUSION_DROP",
        0.0,
        "dropout of LAVT's fusion",
        "--fusion_drop",
        at_least=0,
        below=1,
        models=("lavt", "lavt_one"),
    ),
    Option("MODEL.DROP_PATH_RATE", 0.3, "stochastic depth of the last Swin block", at_least=0, below=1),
    Option("MODEL.TEXT_DROPOUT", 0.1, "dropout of the language encoder", at_least=0, below=1),
    Option("MODEL.EMBED_DIM", 0, "channels of the first Swin stage (default: of the Swin type)", at_least=0),
    Option("MODEL.DEPTHS", [], "Swin blocks per stage (default: of the Swin type)"),
    Option("MODEL.NUM_HEADS", [], "Swin attention heads per stage (default: of the Swin type)"),
    # The config.json of --ck_bert has precedence over these four defaults.
    Option("MODEL.TEXT_DIM", 768, "width of the language encoder", above=0),
    Option("MODEL.TEXT_LAYERS", 6, "layers of BERT; in CrossVLT, those of language stage 1", above=0),
    Option("MODEL.TEXT_HEADS", 12, "attention heads of the language encoder", above=0),
    Option("MODEL.VOCAB_SIZE", BERT_VOCAB_SIZE, "entries of the word embedding", above=0),
    Option(
        "MODEL.ALIGN_DIM",
        256,
        "width of the space in which the alignment losses compare features; of VLT's transformer",
        above=0,
        models=("crossvlt", "vlt"),
    ),
    # Initial weights
    Option(
        "PRETRAINED.SWIN",
        "",
        f"ImageNet Swin file (default: by Swin type, in ./pretrained); {NO_FILE}: random weights",
        "--pretrained_swin_weights",
        metavar="FILE",
        path="input",
    ),
    Option(
        "PRETRAINED.BERT",
        BERT,
        "weights of BERT or of another encoder in its format, with its sizes in a config.json beside them: a file, a "
        f"folder or a Hub name; {NO_FILE}: random weights",
        "--ck_bert",
        metavar="BERT",
        path="input",
    ),
    Option(
        "PRETRAINED.TOKENIZER",
        "",
        f"vocabulary: a vocab.txt, a folder or a Hub name (default: that of a checkpoint, of --ck_bert, or of {BERT}; "
        "refshapes: its own)",
        "--bert_tokenizer",
        BOTH,
        may_change_on_resume=True,
        metavar="BERT",
        path="input",
    ),
    Option(
        "PRETRAINED.FROM_SCRATCH",
        False,
        "start both encoders from random weights instead of pretrained files",
        "--from_scratch",
    ),
    Option(
        "PRETRAINED.INIT_FROM",
        "",
        "start a new run from the weights of a checkpoint",
        "--init_from",
        metavar="FILE",
        path="input",
        hint=RELEASED_HINT,
    ),
    Option(
        "PRETRAINED.DDP_TRAINED",
        False,
        "fail unless the checkpoint's keys begin with 'module.' (by default both forms are accepted)",
        "--ddp_trained_weights",
        BOTH,
        may_change_on_resume=True,
    ),
    # Training
    Option("TRAIN.EPOCHS", 40, "passes over the training split", "--epochs", above=0, may_change_on_resume=True),
    Option(
        "TRAIN.STEPS",
        0,
        "length of the training in optimizer steps, instead of --epochs",
        "--steps",
        at_least=0,
        may_change_on_resume=True,
    ),
    Option("TRAIN.LR", 3e-5, "initial learning rate", "--lr", above=0),
    Option("TRAIN.WEIGHT_DECAY", 1e-2, "weight decay", "--wd --weight-decay", at_least=0, metavar="WD"),
    Option("TRAIN.AMSGRAD", False, "AMSGrad variant of AdamW", "--amsgrad"),
    Option("TRAIN.WARMUP_STEPS", 0, "steps of linear warm-up (published: 0)", "--warmup_steps", at_least=0),
    Option("TRAIN.CLIP_GRAD", 0.0, "largest gradient norm; 0: no clipping (published)", "--clip_grad", at_least=0),
    Option(
        "TRAIN.SEGMENTATION_WEIGHT", 2.0, "factor of the cross-entropy in the loss", "--segmentation_weight", above=0
    ),
    Option(
        "TRAIN.ALIGNMENT", True, "train with the alignment losses", "--alignment --no_alignment", models=("crossvlt",)
    ),
    Option(
        "TRAIN.TRAIN_TEMPERATURE",
        False,
        "train the temperatures (paper: yes, published code: no)",
        "--train_temperature",
        models=("crossvlt",),
    ),
    Option(
        "TRAIN.EMA",
        0.0,
        "decay of a moving average of the weights, which is validated and saved as best.pth; 0: off (published)",
        "--ema",
        at_least=0,
        below=1,
    ),
    Option(
        "TRAIN.ACCUM_STEPS",
        0,
        "forward passes per process and optimizer step",
        "--accum-steps",
        at_least=0,
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.GLOBAL_BATCH",
        0,
        "samples per optimizer step, over all processes and accumulated passes (published: 12)",
        "--global_batch",
        at_least=0,
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.GLOBAL_NORM",
        False,
        "normalize the cross-entropy over the global batch (published: per forward pass)",
        "--global_norm",
    ),
    Option(
        "TRAIN.AMP",
        "off",
        "mixed precision (published: off; test.py does not inherit it from the training)",
        "--amp",
        BOTH,
        choices=("off", "bf16", "fp16"),
    ),
    Option("TRAIN.TF32", False, "TF32 matrix products and convolutions on a GPU (published: off)", "--tf32", BOTH),
    Option(
        "TRAIN.COMPILE",
        False,
        "compile the encoders' blocks (the first steps take minutes)",
        "--compile",
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.GRAD_CHECKPOINT",
        False,
        "recompute the encoders' activations in the backward pass: saves memory, costs time",
        "--grad_checkpoint",
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.SAVE_STEPS",
        0,
        "also save a checkpoint every N steps; 0: never",
        "--save_steps",
        at_least=0,
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.SAVE_MINUTES",
        30.0,
        "also save a checkpoint every N minutes; 0: never",
        "--save_minutes",
        at_least=0,
        may_change_on_resume=True,
    ),
    Option(
        "TRAIN.KEEP", 2, "number of newest resumable checkpoints to keep", "--keep", above=0, may_change_on_resume=True
    ),
    # Run
    Option(
        "OUTPUT_DIR",
        "./checkpoints",
        "checkpoints are written to <output-dir>/<model_id>/",
        "--output-dir",
        may_change_on_resume=True,
        metavar="DIR",
        path="output",
    ),
    Option(
        "LOG_DIR",
        "./models",
        "logs are written to <log_dir>/<model_id>/",
        "--log_dir",
        may_change_on_resume=True,
        metavar="DIR",
        path="output",
    ),
    Option(
        "MODEL_ID",
        "",
        "name of the run (default: <dataset>_<splitBy>_<swin_type>_<time>)",
        "--model_id",
        may_change_on_resume=True,
    ),
    Option("PRINT_FREQ", 10, "steps between log lines", "--print-freq", above=0, may_change_on_resume=True),
    Option(
        "BATCH_SIZE",
        6,
        "samples per process and forward pass",
        "-b --batch-size",
        BOTH,
        above=0,
        may_change_on_resume=True,
    ),
    Option(
        "WORKERS", 2, "data-loading workers per process", "-j --workers", BOTH, at_least=0, may_change_on_resume=True
    ),
    Option(
        "PIN_MEM", False, "page-locked memory: faster transfers to a GPU", "--pin_mem", BOTH, may_change_on_resume=True
    ),
    Option("SEED", 0, "random seed", "--seed", BOTH, at_least=0),
    Option("DEVICE", "auto", "auto, cpu, cuda or cuda:N", "--device", BOTH, may_change_on_resume=True),
)
