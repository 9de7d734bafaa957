"""Where everything was published that this project reads: annotations, pictures, weights."""

SWIN_ADDRESS = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
SWIN_FILES = {  # swin_type: file
    "tiny": "swin_tiny_patch4_window7_224.pth",
    "small": "swin_small_patch4_window7_224.pth",
    "base": "swin_base_patch4_window12_384_22k.pth",
    "large": "swin_large_patch4_window12_384_22k.pth",
}
