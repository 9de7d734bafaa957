"""Where everything was published that this project reads: annotations, pictures, weights."""

from urllib.parse import quote

from lib.variants import SWIN_VARIANTS

REFER_ADDRESS = "https://bvisionweb1.cs.unc.edu/licheng/referit/data/"  # the server is gone
SNAPSHOTS = {  # dataset: when the Internet Archive kept its archive
    "refcoco": "20220413011718",
    "refcoco+": "20220413011656",
    "refcocog": "20220413012904",
}
COCO_ADDRESS = "http://images.cocodataset.org/"
COCO_ZIP = "train2014.zip"
SWIN_ADDRESS = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
SWIN_FILES = {name: variant["pretrained"] for name, variant in SWIN_VARIANTS.items()}
BERT_ADDRESS = "https://huggingface.co/bert-base-uncased/resolve/main/"
BERT_VOCABULARY = "vocab.txt"
BERT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # either will do; the first is the one to download


def annotation_addresses(dataset: str) -> list[str]:
    """Of a COCO set's annotation archive, the one that is likelier to answer first."""
    original = f"{REFER_ADDRESS}{dataset}.zip"
    return [f"https://web.archive.org/web/{SNAPSHOTS[dataset]}/{original}", original]


def picture_address(file_name: str) -> str:
    """Of a single picture of COCO train2014."""
    return f"{COCO_ADDRESS}train2014/{quote(file_name)}"


def weight_addresses(file_name: str) -> list[str]:
    """Of a file of weights, or of BERT's vocabulary."""
    return [(SWIN_ADDRESS if file_name in SWIN_FILES.values() else BERT_ADDRESS) + file_name]
