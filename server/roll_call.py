"""The roll call of a deployment: which enrolled sites take part in this run.

1. *Wait* until ``deployment.min-sites`` sites are online (0: every active one), at most
   ``deployment.wait`` seconds.  Fewer then: the run does not begin, and the missing ones are named.
   With more than ``min-sites`` enrolled, those who are not online at that moment take part from the
   next start of the run.
2. *Hello* to every active site that is online.  It answers with its counts and its model, or with
   the code of its policy: a site learns the model, the objective and the aggregation of the run
   here, so a policy that demands ``frozen-a`` refuses before anything is trained.
3. *Claims.*  A site hosts one client, with the site's name and the enrolled group.  A node that
   says otherwise is dropped (``claims-other-site``, ``claims-other-group``), and the audit log says
   so.  Its own word never moves a client or a group.
4. *Fit.*  A site without training or validation questions falls out (``no-data``), and so does one
   whose model or data form is not that of more than half of the sites (``manifest-mismatch``,
   ``other-form``).  Where no model has that majority, the run does not begin.
5. *Enough?*  The run begins when the usable sites are at least ``run.quorum`` of those asked and at
   least ``deployment.min-sites``; where that is 0, every group that was asked must also have a
   usable site.  An operator who sets ``min-sites`` has said that groups may be missing.

**Resume.**  A site that took part before and is offline now stays a member: it counts as missing
until it is back, under whatever node id, and goes on with its history.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from fedalign import wire
from fedalign.config import Config, to_site_json
from fedalign.errors import RunFailed
from fedalign.ledger import ClientRow, Ledger
from server.asking import OFFLINE
from server.directory import Directory, Member, build
from server.enrolled import Enrolled, OnlineSite
from server.hello import exchange_hello
from server.progress import Progress

OTHER_SITE, OTHER_GROUP = "claims-other-site", "claims-other-group"


def call_sites(
    grid: Grid,
    config: Config,
    enrolled: Enrolled,
    ledger: Ledger,
    progress: Progress,
    poll: float,
) -> Directory:
    """Return the sites that take part; those of an earlier start that are offline have no node.

    Raises ``RunFailed`` when too few sites, or none of a group, can take part.
    """
    online = _wait(grid, config, enrolled, progress, poll)
    hellos, reasons = exchange_hello(
        grid,
        [o.node for o in online.values()],
        to_site_json(config),
        config.run.round_timeout,
        poll,
    )
    fallen: dict[str, str] = {}
    faults = {
        site: reasons.get(o.node) or false_claim(o, hellos[o.node]) for site, o in online.items()
    }
    common = _majority([hellos[online[site].node] for site, fault in faults.items() if not fault])
    for site, o in online.items():
        reason = faults[site] or _misfit(hellos[o.node], common)
        if reason:
            fallen[site] = reason
            event = reason if reason in (OTHER_SITE, OTHER_GROUP) else "site-refused"
            ledger.event(event, reason, phase="hello", client=site)
            enrolled.note(event, site=site, group=o.group, code=reason, run=config.run.name)
            progress.warn(f"site '{site}' (group {o.group}) does not take part: {reason}")
    usable = {site: o for site, o in online.items() if site not in fallen}
    _check_enough(config, online, usable, fallen)
    found = build((o.node, hellos[o.node]) for o in usable.values())
    waited_for = _members_away(config, enrolled, ledger, online, fallen)
    members = {**found.members, **{m.client: m for m in waited_for}}
    ordered = {name: members[name] for name in sorted(members)}
    return replace(found, members=ordered, enrolled=True).located(usable)


def false_claim(site: OnlineSite, hello: wire.Hello) -> str:
    """Return the code of what a node claims beyond its enrolment; empty when it claims nothing."""
    if hello.clients != (site.site,):
        return OTHER_SITE
    return "" if hello.groups == (site.group,) else OTHER_GROUP


def _majority(hellos: Sequence[wire.Hello]) -> tuple[wire.Manifest, str] | None:
    """Return the model and data form that more than half of the sites have; None without one."""
    counts = Counter((h.manifest, h.form) for h in hellos)
    for what, count in counts.items():
        if 2 * count > len(hellos):
            return what
    return None


def _misfit(hello: wire.Hello, common: tuple[wire.Manifest, str] | None) -> str:
    """Return the code of why a site's data or model do not fit the run; empty when they do."""
    if not (hello.train[0] and hello.validation[0]):
        return "no-data"
    if common is None or (hello.manifest, hello.form) == common:
        return ""
    return "manifest-mismatch" if hello.manifest != common[0] else "other-form"


def _wait(
    grid: Grid, config: Config, enrolled: Enrolled, progress: Progress, poll: float
) -> dict[str, OnlineSite]:
    """Return the sites that are online, once there are enough of them."""
    deployment = config.deployment
    end = time.monotonic() + deployment.wait
    said = False
    while True:
        active, online = enrolled.active(), enrolled.online(grid)
        needed = deployment.min_sites or len(active)
        if online and len(online) >= needed:
            return online
        away = [site for site in active if site not in online]
        if time.monotonic() >= end:
            break
        if not said:
            said = True
            progress.phase(
                "hello", f"{len(online)} of {needed} sites online; waiting for {_names(away)}"
            )
        time.sleep(poll)
    if not active:
        raise RunFailed("no site is enrolled. Invite sites (fedalign-server invite) first.")
    raise RunFailed(
        f"{len(online)} of {needed} sites are online after deployment.wait = {deployment.wait:g} "
        f"s; {len(active)} are enrolled. Missing: {_names(away) or 'further sites to enrol'}. "
        "Start them (fedalign-client start), wait longer, or set deployment.min-sites to how many "
        "will do."
    )


def _check_enough(
    config: Config,
    asked: Mapping[str, OnlineSite],
    usable: Mapping[str, OnlineSite],
    fallen: Mapping[str, str],
) -> None:
    """Raise ``RunFailed`` unless the run may begin with the usable sites; rule 5 of this file."""
    why = _names([f"{site} ({code})" for site, code in sorted(fallen.items())])
    least = config.deployment.min_sites
    needed = max(1, least, math.ceil(config.run.quorum * len(asked) - 1e-9))
    if len(usable) < needed:
        raise RunFailed(
            f"hello: {len(usable)} of {len(asked)} sites can take part, {needed} needed "
            f"(run.quorum = {config.run.quorum:g}, deployment.min-sites = {least}). Left out: "
            f"{why}. The cause is in the log of the site; nothing private is sent here."
        )
    lost = sorted({o.group for o in asked.values()} - {o.group for o in usable.values()})
    if lost and not least:
        raise RunFailed(
            f"hello: no site of group {_names(lost)} can take part; left out: {why}. Settle it "
            "with the site, or set deployment.min-sites to go on without the group."
        )


def _members_away(
    config: Config,
    enrolled: Enrolled,
    ledger: Ledger,
    online: Mapping[str, OnlineSite],
    fallen: Mapping[str, str],
) -> list[Member]:
    """Return the members of an earlier start that are active, but not online now."""
    if not config.run.resume:
        return []
    active = enrolled.active()

    def is_away(row: ClientRow) -> bool:
        gone = row.client not in online or fallen.get(row.client) == OFFLINE
        return gone and active.get(row.client) == row.group

    return [
        Member(r.client, r.group, None, r.train, r.validation, r.test, r.size)
        for r in ledger.clients()
        if is_away(r)
    ]


def _names(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
