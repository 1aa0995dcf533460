"""Calls to the SuperLink that may die in the middle of one and be started again.

Flower's own client asks again for as long as nobody answers, so a SuperLink that restarts costs a
call some seconds.  Two cuts it does not mend (flwr 1.41):

- the SuperLink stored a piece of a message and died before it said so: the piece that comes again
  is refused as one that nobody waits for;
- the connection broke in the TLS handshake: that is taken for a wrong certificate.

A message that did not get out whole makes the attempt void (:class:`NotSent`), and the next one
sends new messages; what some site still answers to the old ones is not asked for.  A pull is asked
again until the time of the round is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedalign.compat import LINK_ERRORS, NodeInfo
from fedalign.errors import RunFailed

log = logging.getLogger("fedalign.server")

TRIES = 10
PAUSE = 2.0
"""Tries to list the nodes, and seconds between two."""


class NotSent(RunFailed):
    """Not all messages got to the SuperLink."""


def push(grid: Grid, messages: Iterable[Message]) -> set[str]:
    """Send messages; return the ids of those that replies can come to.

    Flower gives no id to a message for a node that was unregistered a moment ago.  Raises
    :class:`NotSent` when the SuperLink broke off.
    """
    try:
        return {i for i in grid.push_messages(messages) if i}
    except LINK_ERRORS as error:
        raise NotSent(
            f"the SuperLink broke off while messages were sent ({type(error).__name__})."
        ) from error


def pull(grid: Grid, ids: Collection[str]) -> list[Message]:
    """Return the replies that are there; none when the SuperLink broke off, so ask again."""
    try:
        return list(grid.pull_messages(list(ids)))
    except LINK_ERRORS as error:
        log.warning("the SuperLink broke off a pull: %s", type(error).__name__)
        return []


def nodes(grid: Grid) -> list[NodeInfo]:
    """Return the nodes that are online; ``RunFailed`` when the SuperLink breaks off every try."""
    for left in reversed(range(TRIES)):
        try:
            return list(grid.get_nodes())
        except LINK_ERRORS as error:
            log.warning("the SuperLink broke off: %s", type(error).__name__)
            if not left:
                raise RunFailed(
                    f"the SuperLink broke off {TRIES} times in a row "
                    f"({type(error).__name__}); see its log, then resume the run."
                ) from error
        time.sleep(PAUSE)
    raise AssertionError("unreachable")
