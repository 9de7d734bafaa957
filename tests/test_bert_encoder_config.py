"""Any encoder in BERT's format as the language encoder, and encoders that start from random weights."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

from bert.encoder_config import EncoderSizes, read_encoder_sizes
from bert.tokenization import SPECIAL_TOKENS, fingerprint, load_tokenizer, tokenize
from CrossVLT import build_crossvlt
from lib import config
from lib.checkpoint import load_pretrained, read_checkpoint
from lib.engine.build import find_pretrained, set_encoder_sizes
from lib.errors import UserError
from lib.fusion import padding_bias

WORDS = ("the", "red", "blue", "circle", "square", "left", "right", "large", "small", "of", "##s", "Paris", "paris")
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 30}


@pytest.fixture
def encoder(tmp_path):
    """A folder with a small random encoder as transformers writes it, with heads of 6 channels."""
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    BertModel(BertConfig(**SIZES, intermediate_size=96)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    return folder


@pytest.fixture
def resolved(tmp_path):
    """Return cfg and given of flags of train.py, with the sizes of the encoder."""

    def resolve(*flags):
        parser = config.get_parser("train", "", lambda parser: None)
        cfg, given = config.load_config(parser.parse_args(["--pretrained_swin_weights", "none", *map(str, flags)]))
        set_encoder_sizes(cfg, given, find_pretrained(cfg)[1])
        return cfg

    return resolve


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_hidden_states_equal_those_of_transformers(encoder, resolved):
    cfg = resolved("--ck_bert", encoder)
    assert read_encoder_sizes(encoder / "config.json") == EncoderSizes(24, 3, 4, 30)
    assert (cfg.MODEL.TEXT_DIM, cfg.MODEL.TEXT_LAYERS, cfg.MODEL.TEXT_HEADS, cfg.MODEL.VOCAB_SIZE) == (24, 3, 4, 30)
    cfg.MODEL.SWIN_TYPE = "tiny"
    model = build_crossvlt(**config.model_keywords(cfg, 0)).eval()
    load_pretrained(model, None, find_pretrained(cfg)[1])
    tokenizer = load_tokenizer(config.tokenizer_name(cfg, 30))
    ids, mask = map(torch.from_numpy, tokenize(tokenizer, ["the red circle", "left", "unknown words of the square"], 9))
    ids, mask = ids.long(), mask.long()
    published = BertModel.from_pretrained(encoder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = published(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found = model.lang_stage1(ids, padding_bias(mask, torch.float32))[mask.bool()]
    assert torch.equal(found, expected)


def test_how_many_layers_are_used(encoder, resolved, tmp_path):
    change(encoder, num_hidden_layers=12)
    assert resolved("--ck_bert", encoder).MODEL.TEXT_LAYERS == 6  # the first six, as published
    path = tmp_path / "layers.yaml"
    for layers in (9, 12):
        path.write_text(f"MODEL: {{TEXT_LAYERS: {layers}}}\n")
        model = resolved("--ck_bert", encoder, "--cfg", path).MODEL
        assert model["TEXT_LAYERS"] == layers
    path.write_text("MODEL: {TEXT_LAYERS: 13}\n")
    with pytest.raises(UserError, match=r"layers.yaml: MODEL.TEXT_LAYERS is 13, but the encoder .* has only 12 layers"):
        resolved("--ck_bert", encoder, "--cfg", path)
    path.write_text("MODEL: {TEXT_DIM: 768}\n")
    with pytest.raises(UserError, match=r"layers.yaml: MODEL.TEXT_DIM is 768, but the encoder of --ck_bert has 24"):
        resolved("--ck_bert", encoder, "--cfg", path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 100}, "the encoder has intermediate_size 100. Only 96 is supported."),
        ({"hidden_act": "relu"}, "hidden_act 'relu'. Only 'gelu' is supported."),
        ({"model_type": "roberta"}, "model_type 'roberta'. Only 'bert' is supported."),
        ({"max_position_embeddings": 1024}, "max_position_embeddings 1024. Only 512"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_size": "24"}, "is not the config.json of an encoder: hidden_size is '24'."),
        ({"vocab_size": True}, "vocab_size is True"),
    ],
)
def test_encoders_of_another_kind_are_rejected(encoder, resolved, changes, message):
    change(encoder, **changes)
    with pytest.raises(UserError) as caught:
        resolved("--ck_bert", encoder)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[1]", "{", "[" * 100000, '{"hidden_size": NaN}'])
def test_a_corrupt_config_is_rejected(encoder, text):
    (encoder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not the config\.json of an encoder: "):
        read_encoder_sizes(encoder / "config.json")


def test_the_encoders_own_tokenizer_is_used(encoder, resolved):
    name = config.tokenizer_name(resolved("--ck_bert", encoder), 30)
    assert name == config.tokenizer_name(resolved("--ck_bert", encoder / "model.safetensors"), 30)
    assert name == str(encoder / "vocab.txt")
    uncased = load_tokenizer(name)
    assert uncased.tokenize("Paris") == ["paris"]
    (encoder / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 512}')
    cased = load_tokenizer(name)
    assert cased.tokenize("Paris") == ["Paris"]
    assert fingerprint(cased) == f"{fingerprint(uncased)}, do_lower_case False"
    (encoder / "tokenizer_config.json").write_text('{"do_lower_case": "no"}')
    with pytest.raises(UserError, match=r"the tokenizer has do_lower_case 'no', which must be true or false"):
        load_tokenizer(name)
    assert config.tokenizer_name(resolved("--ck_bert", encoder, "--bert_tokenizer", "x"), 30) == "x"
    (encoder / "vocab.txt").unlink()
    assert config.tokenizer_name(resolved("--ck_bert", encoder), 30) == "bert-base-uncased"


def test_training_with_another_encoder(encoder, run_here, small_config, tmp_path):
    """Vision starts from random weights. The checkpoint contains the encoder's sizes and vocabulary."""
    sizes = small_config.read_text().replace("FROM_SCRATCH: true", "SWIN: none")
    for key in ("TEXT_DIM: 32, ", "TEXT_LAYERS: 1, ", "TEXT_HEADS: 2, ", "VOCAB_SIZE: 200, "):
        sizes = sizes.replace(key, "")
    (tmp_path / "small.yaml").write_text(sizes)
    flags = ["--cfg", tmp_path / "small.yaml", "--steps", 1, "--model_id", "run", "--ck_bert", encoder]
    done = run_here(
        "train.py", *flags, "--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models", check=True
    )
    assert f"Language encoder {encoder}: the first 3 of 3 layers, 24 channels, 4 heads, 30 word embeddings" in done.err
    checkpoint = read_checkpoint(tmp_path / "checkpoints/run/last.pth")
    assert checkpoint.extra["config"]["MODEL.TEXT_DIM"] == checkpoint.model_config["text_dim"] == 24
    assert checkpoint.model_config["text_heads"] == 4
    assert checkpoint.extra["tokenizer"]["tokens"].split("\n") == [*SPECIAL_TOKENS, *WORDS]
    embeddings = "embeddings.word_embeddings.weight"
    pretrained = read_checkpoint(encoder / "model.safetensors").state_dict
    name = next(name for name in pretrained if name.endswith(embeddings))
    trained = next(value for key, value in checkpoint.state_dict.items() if key.endswith(embeddings))
    assert torch.equal(trained, pretrained[name])  # not optimized


def test_one_encoder_can_start_from_random_weights(encoder, resolved, tmp_path):
    swin = tmp_path / "swin.pth"
    swin.write_bytes(b"")
    flags = ["--pretrained_swin_weights", swin]  # the last of several flags counts
    for more, expected in [
        (["--ck_bert", "none"], (None, None)),
        (["--ck_bert", encoder], (None, encoder / "model.safetensors")),
        ([*flags, "--ck_bert", "none"], (swin, None)),
        ([*flags, "--ck_bert", encoder], (swin, encoder / "model.safetensors")),
        ([*flags, "--ck_bert", encoder, "--from_scratch"], (None, None)),
    ]:
        assert find_pretrained(resolved(*more)) == expected, more
    cfg = resolved("--ck_bert", "none", "--dataset", "refshapes", "--refer_data_root", "d")
    assert config.tokenizer_name(cfg, 30522) == "d/refshapes/vocab.txt"
    assert config.tokenizer_name(resolved("--ck_bert", "none"), 30522) == "bert-base-uncased"
