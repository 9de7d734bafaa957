"""Evaluation protocols: what a published number depends on besides the model (docs/protocols.md). Imports no torch.

A switch is a field of :class:`Protocol`. The flags of test.py and of lib.rescore, the checks of their values and the
suffix of a protocol's name (``paper+gt_mask=union``) are generated from the field's :class:`Switch`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lib.cli import Parser, did_you_mean
from lib.errors import UserError
from lib.variants import EVAL_SIZES, MASK_MODES, MAX_TOKENS

# Properties that all protocols share. They are written into result files, to document how a number was computed.
FIXED = {"text": "raw", "sentences": "all", "precision": ">="}


@dataclass(frozen=True)
class Switch:
    """A setting of a protocol that a flag of the same name can change.

    Args:
        help: help text of the flag.
        type: type of the value.
        choices: the allowed values, if there are few.
        limits: exclusive bounds of a number.
        config_key: key of the option (lib/options.py) that has the value and the flag.
        needs_model: why lib.rescore cannot change the value without running the model again; empty if it can.
        without_target: whether the switch applies without a target mask, as for ``--image``.
    """

    help: str
    type: type = str
    choices: tuple[str, ...] | None = None
    limits: tuple[float, float] | None = None
    config_key: str = ""
    needs_model: str = ""
    without_target: bool = False

    def flag_options(self) -> dict[str, Any]:
        """Return keyword arguments for ``add_argument``, without the help text."""
        return {"choices": self.choices} if self.choices else {"type": self.type, "metavar": "X"}

    def check(self, flag: str, value: Any) -> None:
        """Raise a UserError if a flag's value is not allowed."""
        if self.choices and value not in self.choices:
            hint = did_you_mean(str(value), self.choices)
            raise UserError(f"{flag} {value}: choose one of {', '.join(self.choices)}.{hint}")
        if self.limits and not self.limits[0] < value < self.limits[1]:
            raise UserError(f"{flag} {value}: must be between {self.limits[0]} and {self.limits[1]}.")


def _switch(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"switch": Switch(help, **options)})


@dataclass(frozen=True)
class Protocol:
    """How logits become a mask, and which target mask it is compared with. The fields' help texts describe them."""

    name: str
    gt_mask: str = _switch(
        "paper",
        "pixels in several polygons of an object: holes (paper) or part of the object (union)",
        choices=MASK_MODES,
    )
    eval_size: str = _switch(
        "resized",
        "compare masks at the model's image size, with targets resized by nearest neighbor (resized), or at each "
        "image's own size, with logits resized bilinearly (original)",
        choices=EVAL_SIZES,
        needs_model="a binary mask cannot be converted to the logits at another size",
    )
    threshold: float | None = _switch(
        None,
        "object where its probability is at least X (default: where it is the more probable class)",
        type=float,
        limits=(0, 1),
        needs_model="a binary mask has no probabilities",
        without_target=True,
    )
    max_tokens: int = _switch(
        MAX_TOKENS,
        "token ids kept of a sentence, [CLS] and [SEP] included",
        type=int,
        config_key="DATA.MAX_TOKENS",
        needs_model="the model predicts other masks for sentences that are cut elsewhere",
        without_target=True,
    )

    @property
    def target_key(self) -> tuple[str, str]:
        """The target masks that the protocol needs: (gt_mask, eval_size)."""
        return self.gt_mask, self.eval_size

    def settings(self) -> dict[str, Any]:
        """Return everything that this protocol determines, as written into result files."""
        return {**asdict(self), **FIXED}


SWITCHES: dict[str, Switch] = {item.name: item.metadata["switch"] for item in fields(Protocol) if item.metadata}
PAPER = Protocol("paper")
PROTOCOLS = {
    "paper": PAPER,
    "original": Protocol("original", gt_mask="union", eval_size="original"),
    "lavt": Protocol("lavt", max_tokens=20),  # of LAVT, from which CrossVLT has the rest of its protocol
}


def add_protocol_flags(parser: Parser) -> None:
    """Add ``--protocol`` and a flag for each switch that is not an option of lib/options.py."""
    parser.add_argument(
        "--protocol",
        metavar="NAMES",
        help=f"{', '.join(PROTOCOLS)} or several (paper,original); see docs/protocols.md (default: the one with which "
        "the model was published; CrossVLT: paper)",
    )
    for name, switch in SWITCHES.items():
        if not switch.config_key:
            parser.add_argument(f"--{name}", help=switch.help, **switch.flag_options())


def protocol_name(base: str, settings: Mapping[str, Any]) -> str:
    """Return the name of protocol ``base`` with these settings: ``paper``, or ``paper+gt_mask=union``.

    Args:
        base: a key of ``PROTOCOLS``. If it is unknown, every setting becomes part of the name.
        settings: values by switch name. A missing switch has the value of ``base``.
    """
    unchanged = asdict(PROTOCOLS[base]) if base in PROTOCOLS else {}
    changed = [name for name in SWITCHES if name in settings and settings[name] != unchanged.get(name)]
    return "+".join([base, *(f"{name}={settings[name]}" for name in changed)])


def choose_protocols(names: str, **switches: Any) -> list[Protocol]:
    """Return the protocols of ``--protocol paper,original`` with the given switches applied to each.

    Args:
        names: comma-separated keys of ``PROTOCOLS``.
        switches: values by switch name. None keeps the value of the protocol.

    Raises:
        UserError: an unknown name or value, or the switches make two protocols equal.
    """
    changes = {name: value for name, value in switches.items() if value is not None}
    for name, value in changes.items():
        SWITCHES[name].check(f"--{name}", value)
    chosen: list[Protocol] = []
    for base in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        if base not in PROTOCOLS:
            hint = did_you_mean(base, list(PROTOCOLS))
            raise UserError(f"--protocol {base}: choose from {', '.join(PROTOCOLS)}.{hint}")
        protocol = replace(PROTOCOLS[base], name=protocol_name(base, changes), **changes)
        for other in chosen:
            if replace(other, name=protocol.name) == protocol:
                raise UserError(f"--protocol {names}: these switches make {other.name} and {protocol.name} the same.")
        chosen.append(protocol)
    if not chosen:
        raise UserError(f"--protocol {names!r} contains no name. Choose from {', '.join(PROTOCOLS)}.")
    return chosen
