"""Protocols by name, and single switches that become part of the name."""

import pytest

from lib.errors import UserError
from lib.protocols import PAPER, PROTOCOLS, choose_protocols


def test_the_published_protocol_is_the_default():
    assert choose_protocols("paper") == [PAPER]
    assert PAPER.settings() == {
        "name": "paper", "gt_mask": "paper", "eval_size": "resized", "threshold": None, "max_tokens": 21,
        "text": "raw", "sentences": "all", "precision": ">=",
    }  # fmt: skip
    assert PROTOCOLS["original"].truth == ("union", "original")


def test_switches_are_named():
    (union,) = choose_protocols("paper", gt_mask="union", threshold=0.35)
    assert (union.name, union.gt_mask, union.threshold) == ("paper+gt_mask=union+threshold=0.35", "union", 0.35)
    assert [p.name for p in choose_protocols("paper", gt_mask="paper", eval_size="resized", max_tokens=21)] == ["paper"]
    both = choose_protocols(" original, paper,paper", max_tokens=20)
    assert [p.name for p in both] == ["original+max_tokens=20", "paper+max_tokens=20"]
    names = [p.name for p in choose_protocols("paper,original", gt_mask="union")]
    assert names == ["paper+gt_mask=union", "original"]


@pytest.mark.parametrize(
    ("names", "switches", "told"),
    [
        ("papr", {}, "--protocol papr: choose of paper, original"),
        (" ,", {}, "names no protocol"),
        ("paper", {"gt_mask": "hole"}, "--gt_mask hole: choose one of paper, union"),
        ("paper", {"eval_size": "480"}, "--eval_size 480: choose one of resized, original"),
        ("paper", {"threshold": 1.0}, "--threshold 1.0: a probability between 0 and 1"),
        ("paper", {"threshold": float("nan")}, "a probability between 0 and 1"),
        ("paper,original", {"gt_mask": "union", "eval_size": "original"}, "are the same"),
    ],
)
def test_mistakes(names, switches, told):
    with pytest.raises(UserError, match=told):
        choose_protocols(names, **switches)
