"""The status page as jinja2 source in Python: a Flower bundle carries only ``.py`` files.

The look is the report's.  Style and script are inline and named by hash in the content security
policy, so nothing else can run or load; therefore no element carries a ``style`` attribute.  The
script fetches the page again and swaps ``main``: scroll and opened parts stay.  Without script a
``meta`` refresh does it.
"""

from __future__ import annotations

from fedalign.report.template import STYLE as REPORT_STYLE

REFRESH = 5
"""Seconds between two looks."""

STYLE = (
    REPORT_STYLE
    + """
main { max-width: 1180px; padding-top: 20px; }
header { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline;
  justify-content: space-between; }
h1 { margin: 0; } h2 { margin: 34px 0 8px; } h3 { font-size: 1rem; margin: 22px 0 6px; }
.path { overflow-wrap: anywhere; }
#stale { color: var(--failed); font-weight: 600; }
.attention { list-style: none; margin: 14px 0 0; padding: 0; }
.attention li { max-width: none; margin: 0 0 6px; padding: 8px 12px; background: var(--soft);
  border-left: 5px solid var(--warning); overflow-wrap: anywhere; }
.attention li.failed { border-color: var(--failed); }
.attention b { margin-right: 4px; } .attention .failed b { color: var(--failed); }
.attention .warning b { color: var(--warning); }
.attention span { color: var(--muted); font-size: .875rem; margin-left: 8px; }
.calm { border-left: 5px solid var(--ok); background: var(--soft); padding: 8px 12px;
  margin: 14px 0 0; max-width: none; }
.cards { margin-top: 12px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.card .n { font-size: 1.3rem; } .card .n.words { white-space: normal; overflow-wrap: anywhere; }
.scroll { max-height: none; }
details > .scroll { margin-top: 8px; }
table.list th, table.list td { text-align: left; } table.list td.num { text-align: right; }
table.list thead th.num { text-align: right; }
table.list td { overflow-wrap: anywhere; }
td.wide { white-space: normal; }
tbody th { max-width: 16rem; overflow-wrap: anywhere; }
.tag { display: block; font-size: .75rem; line-height: 1.3; font-weight: 600; }
.tag.worst { color: var(--failed); } .tag.plain { color: var(--muted); font-weight: 400; }
.s-online, .s-completed, .s-up { color: var(--ok); } .s-running { color: var(--shared); }
.s-offline, .s-pending, .s-starting { color: var(--warning); }
.s-failed, .s-unreadable, .s-down, .s-broken { color: var(--failed); font-weight: 600; }
.s-revoked, .s-replaced { color: var(--muted); }
svg.spark, svg.weight { display: inline-block; vertical-align: middle; }
svg.spark polyline { fill: none; stroke: var(--shared); stroke-width: 1.6;
  stroke-linejoin: round; stroke-linecap: round; }
svg.spark circle { fill: var(--shared); } svg.spark .edge { stroke: var(--rule); }
svg.spark.quiet polyline { stroke: var(--base); } svg.spark.quiet circle { fill: var(--base); }
svg.weight .room { fill: var(--bar-base); } svg.weight .fill { fill: var(--shared); }
svg.weight .even { stroke: var(--ink); stroke-width: 1.5; }
code { font: .875em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--soft);
  padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere; }
footer { margin-top: 40px; color: var(--muted); font-size: .875rem; }
a { color: var(--shared); }
@media (max-width: 720px) {
  main { padding: 14px 12px 40px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .scroll { border: 0; border-radius: 0; overflow: visible; }
  table, tbody, tr, tbody th, tbody td { display: block; }
  thead { display: none; }
  tbody tr { border: 1px solid var(--rule); border-radius: 6px; padding: 8px 10px;
    margin-bottom: 8px; }
  tbody th, table.list tbody th { position: static; max-width: none; padding: 0 0 4px; border: 0;
    text-align: left; }
  tbody td, table.list tbody td, table.list tbody td.num { display: flex; padding: 2px 0;
    border: 0; text-align: right; justify-content: space-between; gap: 14px; min-width: 0;
    white-space: normal; align-items: center; }
  tbody td::before { content: attr(data-label); color: var(--muted); flex: none; }
  tbody td > span { min-width: 0; }
  tbody th, table.list tbody th { font-weight: 650; }
  tbody td.wide, table.list tbody td.wide { display: block; text-align: left; }
  td.wide::before { margin-right: 10px; }
}
"""
)

SCRIPT = """
const seconds = Number(document.body.dataset.refresh);
let last = Date.now(), busy = false;
async function look() {
  if (busy || document.hidden || String(getSelection())) return;
  busy = true;
  try {
    const answer = await fetch("/", {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const known = [...document.querySelectorAll("details")].map(d => d.id);
    const open = [...document.querySelectorAll("details[open]")].map(d => d.id);
    const focus = document.activeElement.id;
    document.querySelector("main").replaceWith(page.querySelector("main"));
    for (const d of document.querySelectorAll("details"))
      if (known.includes(d.id)) d.open = open.includes(d.id);
    if (focus) document.getElementById(focus)?.focus({preventScroll: true});
    document.title = page.title;
    last = Date.now();
    document.getElementById("stale").textContent = "";
  } catch {
    const old = Math.round((Date.now() - last) / 1000);
    document.getElementById("stale").textContent = `No answer for ${old} s: what follows is old.`;
  } finally { busy = false; }
}
setInterval(look, 1000 * seconds);
document.addEventListener("visibilitychange", look);
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="{{ refresh }}"></noscript>
<style>{{ style }}</style>
</head>
<body data-refresh="{{ refresh }}">
<main>
{% macro state(word) %}<span class="s-{{ word }}">{{ word }}</span>{% endmacro %}
<header><h1>Coordinator</h1>
<span class="note">As of {{ s.time | clock_seconds }} <span id="stale" role="status"></span></span>
</header>
<p class="note path">{{ s.state }}</p>

<section aria-label="Needs attention">
{% if s.attention %}<ul class="attention">
{% for a in s.attention %}<li class="{{ a.level }}"><b>\
{{ "Failed:" if a.level == "failed" else "Look:" }}</b>{{ a.text | printable }}\
{% if a.todo %}<span>{{ a.todo | printable }}</span>{% endif %}</li>
{% endfor %}</ul>
{% else %}<p class="calm">Nothing needs attention.</p>{% endif %}
</section>

{% if run %}
<section>
<h2>Run {{ run.brief.name | printable }}</h2>
<div class="cards">
<div class="card"><b>Where it is</b><div class="n words">{{ state(run.brief.status) }}</div>
<div class="sub">{{ run.brief | progress }}</div>
{% if run.brief.resumed %}<div class="sub">resumed {{ run.brief.resumed }} \
{{ "time" if run.brief.resumed == 1 else "times" }}</div>{% endif %}</div>
<div class="card"><b>Average over groups</b><div class="n">{{ run.average | number }}</div>
<div class="sub">{% if run.average is none %}no score is recorded yet{% else %}\
{{ at }}, {{ over }}{% endif %}</div></div>
<div class="card"><b>Worst-served group</b>\
<div class="n">{{ run.worst_score | number }}</div>
<div class="sub">{{ run.worst | printable }}</div></div>
<div class="card"><b>Refused or missing</b><div class="n">{{ run.bad_total }}</div>
<div class="sub">{{ "reply" if run.bad_total == 1 else "replies" }} in this run</div></div>
</div>
<dl>
{% if run.brief.started %}<dt>Started</dt><dd>{{ run.brief.started | clock }}\
{% if run.brief.resumed %} (last resume){% endif %}</dd>{% endif %}
<dt>Last change</dt><dd>{{ run.brief.changed | ago }}</dd>
<dt>Score</dt><dd>{{ score }}; higher is better. Only rounds that count are shown.</dd>
<dt>Folder</dt><dd><code>{{ run.brief.folder }}</code></dd>
<dt>Report</dt><dd>{% if run.brief.report %}\
<a href="/runs/{{ run.brief.name | urlencode }}/report">report of this run</a> \
<code>{{ run.brief.report }}</code>{% else %}none yet{% endif %}</dd>
</dl>
{% if groups %}
<h3>Groups</h3>
<div class="scroll"><table>
<thead><tr><th>Group</th><th>sites</th><th>score</th><th>history</th>\
<th>score over {{ word }}s</th><th>weight</th><th>weight over {{ word }}s</th>\
<th>replies in {{ word }} {{ run.last_round if run.last_round else "–" }}</th></tr></thead>
<tbody>
{% for g in groups %}<tr><th>{{ g.facts.group | printable }}{% if g.note %}\
<span class="tag {{ "worst" if g.worst else "plain" }}">{{ g.note }}</span>{% endif %}</th>
<td data-label="sites"><span>{{ g.facts.sites }}</span></td>
<td data-label="score"><span>{{ g.facts.score | number }}</span></td>
<td data-label="history"><span>{{ g.facts.history | number }}</span></td>
<td data-label="score over {{ word }}s"><span>{{ g.scores }}</span></td>
<td data-label="weight"><span>{{ g.facts.weight | number }} {{ g.weight }}</span></td>
<td data-label="weight over {{ word }}s"><span>{{ g.weights }}</span></td>
<td data-label="replies"><span>{% if g.facts.asked %}{{ g.facts.usable }} of \
{{ g.facts.asked }}{% else %}–{% endif %}</span></td></tr>
{% endfor %}</tbody></table></div>
<p class="note">Score lines share one scale, {{ low | number(2) }} to {{ high | number(2) }}. \
The mark in a weight bar is an equal share.</p>
{% endif %}
{% if run.bad_replies %}
<details id="replies"{% if run.bad_replies | length <= 8 %} open{% endif %}>\
<summary id="replies-summary">Refused or missing replies ({{ run.bad_total }}\
{% if run.bad_total > run.bad_replies | length %}, the last {{ run.bad_replies | length }} shown\
{% endif %})</summary>
<div class="scroll"><table class="list">
<thead><tr><th>Client</th><th>code</th><th>phase</th><th class="num">round</th>\
<th class="num">attempt</th><th>outcome</th><th>when</th></tr></thead><tbody>
{% for b in run.bad_replies | reverse %}<tr><th>{{ b.client | printable }}</th>
<td data-label="code"><span>{{ b.code | printable }}</span></td>
<td data-label="phase"><span>{{ b.phase }}</span></td>
<td data-label="round" class="num"><span>{{ b.round }}</span></td>
<td data-label="attempt" class="num"><span>{{ b.attempt }}</span></td>
<td data-label="outcome"><span>{{ b | counted }}</span></td>
<td data-label="when"><span>{{ b.time | ago }}</span></td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
{% if run.events %}
<details id="events"><summary id="events-summary">Last events of the run \
({{ run.events | length }})</summary>
<div class="scroll"><table class="list">
<thead><tr><th>Event</th><th>when</th><th>phase</th><th>client</th><th>what</th></tr></thead><tbody>
{% for e in run.events | reverse %}<tr><th>{{ e.kind | printable }}</th>
<td data-label="when"><span>{{ e.time | clock }}</span></td>
<td data-label="phase"><span>{{ e.where or "–" }}</span></td>
<td data-label="client"><span>{{ e.client | printable or "–" }}</span></td>
<td data-label="what" class="wide"><span>{{ e.detail | printable or "–" }}</span></td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
</section>
{% endif %}

<section>
<h2>Sites</h2>
{% if s.sites %}
{% if not s.nodes_known %}<p class="note">Who is online is not known: the SuperLink did not say.\
</p>{% endif %}
<div class="scroll"><table class="list">
<thead><tr><th>Site</th><th>group</th><th>status</th><th>enrolled</th><th>last seen</th>\
<th>last reply</th></tr></thead><tbody>
{% for x in s.sites %}<tr><th>{{ x.site | printable }}</th>
<td data-label="group"><span>{{ x.group | printable }}</span></td>
<td data-label="status">{{ state(x.status) }}</td>
<td data-label="enrolled"><span>{{ x.enrolled | clock }}</span></td>
<td data-label="last seen"><span>{{ x.last_seen | ago }}</span></td>
<td data-label="last reply"><span>{% if x.last_code %}{{ x.last_code | printable }} \
({{ x.last_where }}){% else %}–{% endif %}</span></td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>No site has joined yet. Run: \
<code>fedalign-server invite --site NAME --group GROUP</code></p>{% endif %}
{% if s.invites %}
<h3>Open invites</h3>
<div class="scroll"><table class="list">
<thead><tr><th>Site</th><th>group</th><th>ends</th></tr></thead><tbody>
{% for i in s.invites %}<tr><th>{{ i.site | printable }}</th>
<td data-label="group"><span>{{ i.group | printable }}</span></td>
<td data-label="ends"><span>{{ i.expires | clock }} ({{ i.expires | until }})</span></td></tr>
{% endfor %}</tbody></table></div>
{% elif s.sites %}<p class="note">No invite is open.</p>{% endif %}
</section>

<section>
<h2>Runs</h2>
{% if s.runs %}
<div class="scroll"><table class="list">
<thead><tr><th>Run</th><th>status</th><th>where</th><th>started</th><th>last change</th>\
<th>report</th></tr></thead><tbody>
{% for b in s.runs[:shown_runs] %}<tr><th>{{ b.name | printable }}</th>
<td data-label="status">{{ state(b.status) }}</td>
<td data-label="where" class="wide"><span>{{ b | progress }}\
{% if b.status == "failed" and b.reason %}: {{ b.reason | printable }}{% endif %}</span></td>
<td data-label="started"><span>{% if b.started %}{{ b.started | clock }}{% else %}–{% endif %}\
</span></td>
<td data-label="last change"><span>{{ b.changed | ago }}</span></td>
<td data-label="report"><span>{% if b.report %}<a href="/runs/{{ b.name | urlencode }}/report">\
report</a>{% else %}–{% endif %}</span></td></tr>
{% endfor %}</tbody></table></div>
{% if s.runs | length > shown_runs %}<p class="note">And {{ s.runs | length - shown_runs }} older \
runs.</p>{% endif %}
{% else %}<p>No run yet. Run: <code>fedalign-server run</code></p>{% endif %}
</section>

<section>
<h2>Host</h2>
<dl>
<dt>Processes</dt><dd>{% for p in s.processes %}{{ p.name | printable }} \
<span class="{{ "s-up" if p.alive else "s-down" }}">{{ "up" if p.alive else "not running" }}\
</span>{% if not loop.last %}, {% endif %}{% else %}none started by \
<code>fedalign-server start</code>{% endfor %}</dd>
{% for c in s.certificates %}<dt>{{ c.name | capitalize_first }}</dt><dd>ends \
{{ c.expires | clock }} ({{ c.expires | until }})</dd>
{% endfor %}<dt>Audit log</dt><dd{% if s.audit.state == "broken" %} class="s-broken"{% endif %}>\
{{ audit | printable }}</dd>
<dt>Disk</dt><dd>{{ disk }} free</dd>
</dl>
</section>
<footer>{{ "This page looks again every" }} {{ refresh }} s. Also: <a href="/status.json">\
status.json</a>, <a href="/ready">ready</a>, <a href="/health">health</a>.</footer>
</main>
<script>{{ script }}</script>
</body>
</html>
"""
