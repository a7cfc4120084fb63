"""The process after the restart: `python -m tiertree.chat.child SETTING DIRECTORY`.

SETTING is `Setting.plain` as JSON. Writes one JSON object per line whenever something was answered: what was
answered since, how many requests are in flight, and the seconds since the first prompt.
"""

from __future__ import annotations

import json
import sys

from .course import Course
from .runs import Setting, tiered


def main(setting: str, directory: str) -> None:
    """Have the conversations of `setting` once more, with the disk tier in `directory`."""
    told = 0

    def tell(course: Course, running: int) -> None:
        nonlocal told
        new = [each.plain() for each in course.served[told:]]
        if new or not running:
            told += len(new)
            said = {"served": new, "running": running, "seconds": course.seconds}
            print(json.dumps(said), flush=True)

    chosen = Setting.read(json.loads(setting))
    tiered(chosen, chosen.model(), directory, tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
