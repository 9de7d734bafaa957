"""Protocols by name, and the switches that become part of the name."""

import pytest

from lib.errors import UserError
from lib.protocols import PAPER, PROTOCOLS, choose_protocols, protocol_name


def test_the_published_protocol_is_the_default():
    assert choose_protocols("paper") == [PAPER]
    assert PAPER.settings() == {
        "name": "paper", "gt_mask": "paper", "eval_size": "resized", "threshold": None, "max_tokens": 21,
        "text": "raw", "sentences": "all", "precision": ">=",
    }  # fmt: skip
    assert PROTOCOLS["original"].target_key == ("union", "original")


def test_changed_switches_become_part_of_the_name():
    (union,) = choose_protocols("paper", gt_mask="union", threshold=0.35)
    assert (union.name, union.gt_mask, union.threshold) == ("paper+gt_mask=union+threshold=0.35", "union", 0.35)
    assert [p.name for p in choose_protocols("paper", gt_mask="paper", eval_size="resized", max_tokens=21)] == ["paper"]
    protocols = choose_protocols(" original, paper,paper", max_tokens=20)
    assert [p.name for p in protocols] == ["original+max_tokens=20", "paper+max_tokens=20"]
    names = [p.name for p in choose_protocols("paper,original", gt_mask="union")]
    assert names == ["paper+gt_mask=union", "original"]


def test_the_name_of_settings_is_the_one_chosen_by_flags():
    for names in ("paper", "original"):
        for switches in ({}, {"gt_mask": "union"}, {"gt_mask": "paper", "threshold": 0.5, "max_tokens": 5}):
            (protocol,) = choose_protocols(names, **switches)
            assert protocol_name(names, protocol.settings()) == protocol.name
    assert protocol_name("unknown", {"gt_mask": "paper"}) == "unknown+gt_mask=paper"


@pytest.mark.parametrize(
    ("names", "switches", "message"),
    [
        ("papr", {}, "--protocol papr: choose from paper, original, lavt. Did you mean paper?"),
        (" ,", {}, "contains no name"),
        ("paper", {"gt_mask": "hole"}, "--gt_mask hole: choose one of paper, union"),
        ("paper", {"eval_size": "480"}, "--eval_size 480: choose one of resized, original"),
        ("paper", {"threshold": 1.0}, "--threshold 1.0: must be between 0 and 1"),
        ("paper", {"threshold": float("nan")}, "must be between 0 and 1"),
        ("paper,original", {"gt_mask": "union", "eval_size": "original"}, "paper.* and original the same"),
    ],
)
def test_messages_of_mistakes(names, switches, message):
    with pytest.raises(UserError, match=message):
        choose_protocols(names, **switches)
