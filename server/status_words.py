"""How times, numbers and states read, the same in the terminal and on the page."""

from __future__ import annotations

import time

from server.status_records import GroupFacts, ReplyFacts, RunBrief, RunFacts

MINUTE, HOUR, DAY = 60, 3600, 86400


def clock(moment: float) -> str:
    """Return a time as ``2026-01-31 14:05 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def span(seconds: float) -> str:
    """Return a length of time in its largest fitting unit: ``45 s``, ``12 min``, ``3 h``."""
    seconds = max(0.0, seconds)
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f} min"
    if seconds < 2 * DAY:
        return f"{seconds // HOUR:.0f} h"
    return f"{seconds // DAY:.0f} days"


def ago(moment: float | None, now: float) -> str:
    """Return how long ago; a dash for a moment that is not known."""
    return "–" if moment is None else f"{span(now - moment)} ago"


def until(moment: float, now: float) -> str:
    """Return how long until, or ``over``."""
    return f"in {span(moment - now)}" if moment > now else "over"


def size(amount: int) -> str:
    """Return bytes as ``3.4 GiB`` or ``120 MiB``."""
    if amount >= 2**30:
        return f"{amount / 2**30:.1f} GiB"
    return f"{amount / 2**20:.0f} MiB"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash where there is none; never 0 for none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def printable(text: str) -> str:
    """Return the text with every control character replaced: names may come from data."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def time_word(brief: RunBrief) -> str:
    """Return what a step of the run is called."""
    return "exchange" if brief.mode == "rewards" else "round"


def progress(brief: RunBrief) -> str:
    """Return where a run is, in words."""
    word = time_word(brief)
    rounds = f"{brief.done} of {brief.rounds} {word}s"
    if brief.status in ("starting", "unreadable"):
        return brief.reason
    if brief.status == "completed":
        return rounds + (", stopped early" if brief.stopped_early else "")
    if brief.phase == "train":
        where = f"{word} {brief.done + 1} of {brief.rounds}"
    elif brief.phase == "hello":
        where = "hello"
    else:
        where = f"{brief.phase}, {rounds} done"
    if brief.status == "failed":
        return f"failed in {where}"
    return where + (f", attempt {brief.attempt}" if brief.attempt > 1 else "")


def where(phase: str, round_: int, attempt: int = 1) -> str:
    """Return phase, round and, from the second on, attempt in words."""
    if not phase:
        return ""
    text = f"{phase} {round_}" if phase in ("train", "predictor") else phase
    return text if attempt <= 1 else f"{text}, attempt {attempt}"


def counted(reply: ReplyFacts) -> str:
    """Say whether the attempt that lost a reply counts."""
    if reply.counted is None:
        return "not in the run"
    return "counted" if reply.counted else "attempt void"


def step(run: RunFacts, round_: int) -> str:
    """Return a round as ``round 3``; round 0 is the untouched base."""
    return f"{time_word(run.brief)} {round_}" if round_ else "the base"


def group_note(group: GroupFacts, run: RunFacts) -> str:
    """Return what is special about a group: worst served, absent or withheld; else empty."""
    old = ""
    if group.score_round is not None and group.score_round != run.last_round:
        old = f", score of {step(run, group.score_round)}"
    if group.state == "absent":
        return f"no usable reply{old}"
    if group.state == "withheld":
        return f"score withheld{old}"
    if group.group == run.worst and run.scored > 1:
        return "worst served"
    return ""


def over_groups(run: RunFacts) -> str:
    """Say which groups the average and the worst are over."""
    if run.scored == len(run.groups):
        return f"over all {run.scored} groups" if run.scored != 1 else "one group"
    return f"over {run.scored} of {len(run.groups)} groups; the others gave no score"


def score_name(run: RunFacts) -> str:
    """Return what the score is."""
    if run.brief.mode == "rewards":
        return "mean reward of sampled texts"
    return f"{run.metric} on validation"
