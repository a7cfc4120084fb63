"""Running a check that may hang: in a thread of its own, which is given up after a while."""

from __future__ import annotations

import threading
from collections.abc import Callable

HANG_S = 600.0
"""After how many seconds a check that has not ended counts as hanging. Only a broken one takes so long."""


def ends(what: str, check: Callable[[], None]) -> None:
    """Run `check` to its end and raise what it raises; AssertionError naming `what` if it hangs. A thread
    that hangs is left behind, a daemon."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            check()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="tiertree-conformance", daemon=True)
    thread.start()
    thread.join(HANG_S)
    if raised:
        raise raised[0]
    assert not thread.is_alive(), f"{what} hangs: nothing has happened for {HANG_S} s"
