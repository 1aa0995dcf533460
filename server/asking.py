"""Asking clients: messages out, every reply read, and a quorum of usable ones, or nothing counts.

A client that was asked ends in exactly one of two places: among the usable replies, or among the
failed ones with a short code:

- a status of the wire contract, said by the client or found in its row (``fedalign.wire.STATUS``);
- the reason of a ``WireError``: its message was broken;
- ``no-reply``, or ``flower-error-N``: nothing came, or Flower says so;
- ``offline``: its site was not there, or went away (Flower's error 5).  It is sent nothing;
- ``not-sent``: the SuperLink broke off (``link.py``); the whole attempt is void;
- ``revoked``: the operator revoked the site while its reply was on the way.  The registry is read
  when the replies are counted, so nothing of a revoked site is ever combined.

Below quorum the attempt is void (:class:`QuorumMissed`) and may be repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict

from fedalign import wire
from fedalign.config import Config, to_json, to_site_json
from fedalign.errors import RunFailed, WireError
from fedalign.ledger import EventRow, Ledger
from server.directory import Directory
from server.enrolled import Enrolled

NODE_UNAVAILABLE = 5
"""Flower's code for a node that is offline, or went offline before it answered."""
EXPIRED = (3, 4)
"""Its codes for a message or a reply that is not there any more: ``run.round-timeout`` is over."""
OFFLINE, REVOKED, NO_REPLY, NOT_SENT = "offline", "revoked", "no-reply", "not-sent"
UPLOAD_BYTES = 256_000_000
"""Most bytes of updates in the reply to one message, unless one client's are more."""


class QuorumMissed(RunFailed):
    """Too few usable replies; the attempt is void and may be tried again."""


def failure_reason(code: int) -> str:
    """Return how an error reply of Flower is recorded.  Its text may quote private data."""
    if code in EXPIRED:
        return NO_REPLY
    return OFFLINE if code == NODE_UNAVAILABLE else f"flower-error-{code}"


class Asking:
    """Sends to the clients of the directory and settles what came back."""

    def __init__(self, config: Config, directory: Directory, ledger: Ledger) -> None:
        self.config = config
        self.directory = directory
        self.ledger = ledger
        self.attempt = 1
        self.enrolled: Enrolled | None = None
        """The sites of a deployment; None in a simulation."""
        self.failed: dict[str, str] = {}
        """Client to reason, of the last :meth:`check_quorum`."""
        self._config_json = to_site_json(config) if directory.enrolled else to_json(config)
        self._sent: list[tuple[Message, tuple[str, ...]]] = []
        self._unsent: tuple[str, ...] = ()
        self._keys: dict[str, bytes] = {}

    def asked(self, phase: str, round_: int) -> tuple[str, ...]:
        """Return whom a phase asks: a round of training its sample, all others everybody."""
        run = self.config.run
        sampled = phase == "train" or (
            phase == "predictor" and round_ <= self.config.predictor.rounds
        )
        if not sampled:
            return tuple(self.directory.members)
        return self.directory.sample(run.seed, round_, run.clients_per_round)

    def needed(self, asked: int) -> int:
        """Return how many of ``asked`` clients must be usable (``run.quorum``), at least 1."""
        return max(1, math.ceil(self.config.run.quorum * asked - 1e-9))

    def messages(
        self,
        kind: str,
        phase: str,
        round_: int,
        clients: Sequence[str],
        build: Callable[[wire.Request], RecordDict],
        splits: tuple[str, ...] = (),
    ) -> list[Message]:
        """Return a message for each node and ``clients-per-message`` of its clients.

        A message of training is for fewer where their updates are more than ``UPLOAD_BYTES``.
        ``build`` makes the content from the request; :meth:`collect` reads the replies to these.
        A client whose site is offline gets none.
        """
        members = self.directory.members
        self._sent = []
        self._unsent = tuple(c for c in clients if members[c].node is None)
        self._keys = {c: members[c].key for c in clients}
        at_most = self.config.run.clients_per_message
        if kind == wire.TRAIN:
            update = 4 * max(1, self.directory.manifest.upload_size)
            at_most = max(1, min(at_most, UPLOAD_BYTES // update))
        for node, names in self.directory.jobs(clients, at_most):
            request = wire.Request(
                phase,
                round_,
                self.attempt,
                names,
                self._config_json,
                self.directory.manifest.hash,
                splits,
            )
            message = Message(
                build(request),
                node,
                kind,
                ttl=self.config.run.round_timeout,
                group_id=f"{phase}-{round_}-{self.attempt}",
            )
            self._sent.append((message, names))
        return [m for m, _ in self._sent]

    def not_sent(self, error: RunFailed) -> QuorumMissed:
        """Return what makes an attempt void whose messages did not all get out."""
        asked = [c for _, names in self._sent for c in names]
        self.failed = dict.fromkeys(asked, NOT_SENT) | dict.fromkeys(self._unsent, OFFLINE)
        return QuorumMissed(f"attempt {self.attempt}: {error}")

    def collect(
        self,
        replies: Iterable[Message],
        decode: Callable[[Message, Sequence[str]], None],
        failed: dict[str, str],
    ) -> None:
        """Hand each reply to ``decode``; note why the clients of a lost or broken one failed."""
        waiting = {m.metadata.message_id: names for m, names in self._sent}
        for reply in replies:
            names = waiting.pop(reply.metadata.reply_to_message_id, None)
            if names is None:
                self.ledger.event("stray-reply", attempt=self.attempt)
                continue
            if reply.has_error():
                failed.update(dict.fromkeys(names, failure_reason(reply.error.code)))
                continue
            try:
                decode(reply, names)
            except WireError as error:
                failed.update(dict.fromkeys(names, error.reason))
        for names in waiting.values():
            failed.update(dict.fromkeys(names, NO_REPLY))
        failed.update(dict.fromkeys(self._unsent, OFFLINE))

    def check_quorum(
        self, phase: str, round_: int, usable: MutableMapping[str, Any], failed: dict[str, str]
    ) -> None:
        """Drop what revoked sites sent, note every failed client, and count.

        ``usable`` is keyed by client and loses the revoked ones.  Raises :class:`QuorumMissed` when
        too few are left.
        """
        for client in sorted(self._revoked() & usable.keys()):
            del usable[client]
            failed[client] = REVOKED
            if self.enrolled is not None:
                self.enrolled.note("reply-of-revoked-site", site=client, phase=phase, round=round_)
        self.failed = failed
        now = time.time()
        self.ledger.put_events(
            [
                EventRow(now, "reply-rejected", phase, round_, self.attempt, client, reason)
                for client, reason in sorted(failed.items())
            ]
        )
        asked = len(usable) + len(failed)
        needed = self.needed(asked)
        if len(usable) < needed:
            reasons = ", ".join(sorted(set(failed.values())))
            raise QuorumMissed(
                f"{phase} {round_}, attempt {self.attempt}: {len(usable)} of {asked} clients "
                f"usable, {needed} needed (run.quorum = {self.config.run.quorum:g}); reasons: "
                f"{reasons}."
            )

    def _revoked(self) -> set[str]:
        """Return the clients asked whose key the operator has revoked by now."""
        return set() if self.enrolled is None else self.enrolled.revoked(self._keys)
