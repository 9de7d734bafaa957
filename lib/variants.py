"""Names and sizes of the published models. Other modules import them from here."""

IMG_SIZE = 480  # pixels per side of the resized square image
MAX_TOKENS = 21  # token ids per sentence, [CLS] and [SEP] included
BERT = "bert-base-uncased"
BERT_VOCAB_SIZE = 30522
NUM_STAGES = 4  # of either encoder
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
