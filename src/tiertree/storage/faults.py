"""What can be wrong with a directory of the disk tier, as a table: what it is, what a cache makes of it, and
what a repair does about it.

A *damage* is what should not be and costs something; everything else is only said. What a process leaves
that was killed is no damage, nor is what nobody can read any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of `FAULTS`."""

    damage: bool
    what: str
    cache: str
    repair: str


_LEFT = "left as it is"
_AS_OPENING = "as a cache does"

FAULTS = {
    "page": Fault(
        True, "not the bytes that were written", "finds it CORRUPT once, then forgets it", "quarantined"
    ),
    "page-unreadable": Fault(True, "cannot be read", "finds it CORRUPT once, then forgets it", "quarantined"),
    "page-hidden": Fault(
        False,
        "not the bytes that were written, but a later record of its key hides it",
        "never reads it",
        _LEFT,
    ),
    "page-again": Fault(False, "was wrong when it was read, and right when read again", "serves it", _LEFT),
    "record-header": Fault(
        True,
        "its header is damaged, its bytes are right",
        "finds it CORRUPT once, then forgets it",
        "header written anew",
    ),
    "record-check": Fault(
        True,
        "its header is damaged where nobody looks who has the footer",
        "goes by the footer, and would lose what is behind it without one",
        "header written anew",
    ),
    "segment-header": Fault(
        True,
        "the file's header is damaged, what is behind it is not",
        "removes the file",
        "header written anew",
    ),
    "segment-unusable": Fault(True, "holds nothing that can be used", "removes the file", _AS_OPENING),
    "segment-renamed": Fault(
        True, "another segment's file: move it back if you want its pages", "removes the file", _AS_OPENING
    ),
    "segment-unreadable": Fault(True, "cannot be read", "does not open the directory", "none: status 2"),
    "footer": Fault(True, "the footer is damaged", "walks the records and writes a new one", _AS_OPENING),
    "tail": Fault(
        True, "what follows is no record", "cuts the file off here; what was behind is lost", _AS_OPENING
    ),
    "unfinished": Fault(False, "was being written when its process died", "cuts it off", _AS_OPENING),
    "unsealed": Fault(
        False, "has no footer: its process was killed", "walks the records and seals it", _AS_OPENING
    ),
    "empty": Fault(False, "holds no record", "removes the file", _AS_OPENING),
    "lock": Fault(
        False, "LOCK has not its 32 bytes: killed while opening, or not ours", "writes it", _AS_OPENING
    ),
    "temporary": Fault(False, "left by an interrupted opening", "removes it", _AS_OPENING),
    "foreign": Fault(False, "no file of tiertree's", "leaves it alone and does not count its bytes", _LEFT),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: where, of which page (its storage key), and what else there is to say."""

    fault: str
    file: str
    offset: int | None = None
    key: bytes | None = None
    detail: str = ""

    @property
    def damage(self) -> bool:
        """Whether it makes the directory unsound."""
        return FAULTS[self.fault].damage

    @property
    def what(self) -> str:
        """What is wrong, in words."""
        return FAULTS[self.fault].what + (f" ({self.detail})" if self.detail else "")

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data; the key in hexadecimal."""
        row = FAULTS[self.fault]
        return {
            "fault": self.fault,
            "damage": row.damage,
            "file": self.file,
            "offset": self.offset,
            "key": None if self.key is None else self.key.hex(),
            "what": self.what,
            "cache": row.cache,
            "repair": row.repair,
        }
