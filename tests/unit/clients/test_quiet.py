"""A flood of refusals: a bounded number of lines, and none forgotten."""

from __future__ import annotations

import logging

from clients.quiet import MINUTE, Quiet, QuietLog


def test_lines_of_a_minute():
    now = [0.0]
    quiet = Quiet(3, lambda: now[0])
    assert [quiet.take() for _ in range(5)] == [0, 0, 0, None, None]
    now[0] += MINUTE - 1
    assert quiet.take() is None
    now[0] += 1
    assert [quiet.take() for _ in range(4)] == [3, 0, 0, None]


def test_a_log_says_how_many_lines_are_missing(caplog):
    now = [0.0]
    filter_ = QuietLog(Quiet(2, lambda: now[0]))
    caplog.handler.addFilter(filter_)
    log = logging.getLogger("fedalign.client")
    try:
        for n in range(50):
            log.error("refused %s", n)
        now[0] += MINUTE
        log.error("refused %s", "again")
    finally:
        caplog.handler.removeFilter(filter_)
    found = [r.getMessage() for r in caplog.records]
    assert found == ["refused 0", "refused 1", "(48 lines left out) refused again"]
