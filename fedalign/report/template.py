"""The page, as jinja2 source in Python: a Flower bundle carries only ``.py`` files.

One file, no script, no network.  Every value passes autoescape; only the drawings made here are
marked safe.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --rule: #d8dee4; --soft: #f5f7f9;
  --base: #7d8590; --shared: #0072b2; --personal: #c85200; --local: #7b5ea7;
  --ok: #00734f; --warning: #8a5a00; --failed: #b3261e;
  --bar: #cfe3f1; --bar-base: #e1e5ea; --bar-personal: #f6dcc8;
  --g0: #0072b2; --g1: #c85200; --g2: #00805f; --g3: #b0528c;
  --g4: #9a6a00; --g5: #2b8cc4; --g6: #7b5ea7; --g7: #4a5560; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e7eaee; --muted: #9aa4af; --rule: #343b43; --soft: #1d2227;
  --base: #8b949e; --shared: #56b4e9; --personal: #f0944d; --local: #b79fe0;
  --ok: #3fc79a; --warning: #e8b04b; --failed: #ff8a80;
  --bar: #17435f; --bar-base: #2f363d; --bar-personal: #5a3417;
  --g0: #56b4e9; --g1: #f0944d; --g2: #35c79b; --g3: #e59ac6;
  --g4: #e6b84f; --g5: #8fd0f5; --g6: #b79fe0; --g7: #aab4be; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1044px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 44px 0 6px; }
p { margin: 6px 0 10px; max-width: 72ch; }
.note, figcaption, .sub { color: var(--muted); font-size: .875rem; }
.verdict { border-left: 5px solid var(--muted); background: var(--soft); padding: 12px 16px;
  margin: 18px 0; }
.verdict strong { display: block; font-size: 1.1rem; }
.verdict p { margin: 6px 0 0; }
.ok { border-color: var(--ok); } .warning, .running { border-color: var(--warning); }
.failed { border-color: var(--failed); } .failed strong { color: var(--failed); }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.card { border: 1px solid var(--rule); padding: 12px 14px; border-radius: 6px; min-width: 0; }
.card b { display: block; font-size: .875rem; font-weight: 600; color: var(--muted); }
.card .sub { overflow-wrap: anywhere; }
.card .n { font-size: 1.5rem; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.card .n s { text-decoration: none; color: var(--muted); font-weight: 400; font-size: 1.1rem; }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; vertical-align: middle; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
th { font-weight: 600; } thead th { font-size: .8125rem; line-height: 1.25; }
thead th { position: sticky; top: 0; background: var(--soft); z-index: 2;
  white-space: normal; vertical-align: bottom; }
th:first-child, td.text, th.text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--paper); z-index: 1; font-weight: 500;
  min-width: 6.5rem; max-width: 13rem; white-space: normal; overflow-wrap: break-word; }
thead th:first-child { left: 0; z-index: 3; }
td .sub, th .sub { font-weight: 400; display: block; font-size: .75rem; line-height: 1.2; }
td.wrap { white-space: normal; min-width: 16rem; text-align: left; }
tr.total th, tr.total td { font-weight: 650; background: var(--soft); }
.bar { background: linear-gradient(var(--fill), var(--fill)) left / var(--to) 100% no-repeat; }
.bar.base { --fill: var(--bar-base); } .bar.shared { --fill: var(--bar); }
.bar.personal { --fill: var(--bar-personal); }
.bad { color: var(--failed); font-weight: 600; }
figure { margin: 10px 0; } figure svg { display: block; width: 100%; height: auto; }
.wide svg { max-width: 1000px; } .narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .875rem; margin: 6px 0; }
.legend svg { width: 16px; height: 16px; vertical-align: -3px; margin-right: 5px; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 4px 16px;
  font-size: .875rem; margin: 12px 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
li { max-width: 72ch; margin: 5px 0; }
@media (max-width: 720px) {
  .cards { grid-template-columns: repeat(2, 1fr); gap: 8px; } .card { padding: 10px; }
  .card .sub { overflow-wrap: anywhere; }
.card .n { font-size: 1.2rem; } .card .n s { font-size: .95rem; }
  .wide { display: none; } .narrow { display: block; } .narrow svg { max-width: 400px; }
  tbody th { max-width: 8.5rem; }
  thead th { min-width: 4.6rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
}
@media print { .scroll { max-height: none; overflow: visible; } }
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · fedalign</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{% macro value(x, digits=3, absent="–") -%}
{% if x is none %}{{ absent }}{% else %}{{ x | number(digits) }}{% endif %}
{%- endmacro %}
{% macro bar(x, kind, interval="", absent="–") -%}
{% if x is none %}<td>{{ absent }}</td>{% else %}<td class="bar {{ kind }}" \
style="--to: {{ x | width }}%">{{ x | number(3) }}{% if interval %}<span class="sub">\
{{ interval }}</span>{% endif %}</td>{% endif %}
{%- endmacro %}
{% macro drawing(d) -%}
<div class="wide">{{ d.wide }}</div><div class="narrow">{{ d.narrow }}</div>
{%- endmacro %}

<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>

<section class="verdict {{ verdict.level }}">
<strong>{{ verdict.title }}</strong>
{% for sentence in verdict.sentences %}<p>{{ sentence }}</p>
{% endfor %}</section>

<div class="cards">
{% for card in cards %}<div class="card"><b>{{ card.label }}</b>
<div class="n">{% if card.before is not none %}<s>{{ card.before }} →</s> {% endif %}\
{{ card.after }}</div>
{% for line in card.lines %}<div class="sub">{{ line }}</div>
{% endfor %}</div>
{% endfor %}</div>

<dl>
{% for name, text in facts_list %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>

{% if dumbbells %}
<h2>Each group, before and after</h2>
<p>Test questions; the worst-served group is on top. A short bar is a uniform answerer, a tall bar
the one shared answer that is best for the average{% if not has_optimum %} (not defined here)
{%- else %}: it gives up some groups for others, so a group may stand above it{% endif %}.</p>
<div class="legend">
<span><svg viewBox="0 0 16 16"><circle cx="8" cy="8" r="5" fill="none" stroke="var(--base)"
stroke-width="2.4"/></svg>base</span>
<span><svg viewBox="0 0 16 16"><circle cx="8" cy="8" r="6" fill="var(--shared)"/></svg>shared
adapter</span>
{% if has_personal %}<span><svg viewBox="0 0 16 16"><path d="M8 2l6 6-6 6-6-6z"
fill="var(--personal)"/></svg>personal adapter</span>{% endif %}
<span><svg viewBox="0 0 16 16"><path d="M8 3v10" stroke="var(--ink)"
stroke-width="1.6"/></svg>uniform answerer</span>
{% if has_optimum %}<span><svg viewBox="0 0 16 16"><path d="M8 0v16" stroke="var(--ink)"
stroke-width="3.4"/></svg>best shared answer for the average</span>{% endif %}
</div>
<figure>{{ drawing(dumbbells) }}
<figcaption>The axis does not begin at 0.{% if hidden %} {{ hidden }} groups in the middle are left
out here.{% endif %}</figcaption></figure>
{% endif %}

<h2>Scores by group</h2>
<p class="note">{{ score_text }} Bars fill a cell from {{ score_low | number(2) }} to 1; in
small print the 95% interval.
{% if optimum_note %} Best shared answer for the average: {{ optimum_note }}.{% endif %}
<span class="narrow">The table scrolls sideways.</span></p>
<div class="scroll"><table>
<thead><tr><th>Group</th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><th title="{{ row.group }}">{{ row.group }}</th>
{{ bar(row.base, "base", absent=row.absent) }}
{{ bar(row.shared, "shared", row.interval, row.absent) }}
<td{% if row.change is not none and row.change < 0 %} class="bad"{% endif %}>\
{% if row.change is none %}–{% else %}{{ row.change | signed }}{% endif %}</td>
{% if has_personal %}{{ bar(row.personal, "personal", absent=row.absent) }}{% endif %}
{% for x in row.others %}<td>{{ value(x) }}</td>{% endfor %}
<td{% if row.low_mass %} class="bad"{% endif %}>{{ value(row.mass, 2) }}</td>
<td>{{ row.size }}</td><td>{{ row.clients }}</td><td>{{ row.questions }}</td></tr>
{% endfor %}</tbody></table></div>

{% if policy_rows %}
<h2>How the policy was trained</h2>
<div class="scroll"><table><tbody>
{% for name, text in policy_rows %}<tr><th>{{ name }}</th><td class="wrap">{{ text }}</td></tr>
{% endfor %}</tbody></table></div>
<h2>Distance to the closed-form optimum</h2>
{% if closed_rows %}<p>Reward minus KL has a known optimum: the base times exp(reward / KL
coefficient), over all answers to a question. On test questions, with the rule's last weights:</p>
<div class="scroll"><table><tbody>
{% for name, text in closed_rows %}<tr><th>{{ name }}</th><td>{{ text }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>Not defined here{% if closed_note %}: {{ closed_note }}{% else %}: it needs the answers
of all groups in one place, and a task with few possible answers{% endif %}.</p>{% endif %}
{% endif %}
{% if weights %}
<h2>{{ words.weights }}</h2>
<p>{{ words.weights_text }}
{% if others %}Lines without a label are the other {{ others }} groups.{% endif %}</p>
<figure>{{ drawing(weights) }}</figure>
{% endif %}
{% if validation %}
<h2>{{ words.validation }}</h2>
<p>{{ words.validation_text }}</p>
<figure>{{ drawing(validation) }}
<figcaption>The axis does not begin at 0.</figcaption></figure>
{% endif %}
{% if kl %}
<h2>KL from the base over exchanges</h2>
<p>How far the policy is from the base: nats a text, on the texts of the exchange before its
updates. Where a rule changes the scale of the reward, the policy moves along this axis without
favouring anybody.{% if optimum_kl %} The line “optimum” is the closed form for the rule's last
weights, on test questions.{% endif %}</p>
<figure>{{ drawing(kl) }}</figure>
{% endif %}
{% if formats %}
<h2>Well-formed texts over exchanges</h2>
<p>Share of the sampled texts that are an answer at all.</p>
<figure>{{ drawing(formats) }}</figure>
{% endif %}
{% if evenness %}
<h2>Fairness index of the rewards over exchanges</h2>
<p>How even the groups' rewards are on the well-formed texts; 1 is equal.{% if threshold %} Below
the dashed line the rule takes its adaptive branch.{% endif %}</p>
<figure>{{ drawing(evenness) }}
<figcaption>The axis does not begin at 0.</figcaption></figure>
{% endif %}
{% if loss %}
<h2>Training loss over rounds</h2>
<p>Mean loss of a group's clients during their local steps.{% if loss_note %} {{ loss_note }}
{%- endif %}</p>
<figure>{{ drawing(loss) }}</figure>
{% endif %}

<h2>Average, worst group and spread</h2>
<p class="note">Test questions. In small print: 95% intervals by bootstrap over questions (too
narrow where questions resemble each other), the
same resample for all groups and stages. They say nothing about other seeds.</p>
<div class="scroll"><table>
<thead><tr><th>Number</th>
{% for c in fairness_columns %}<th>{{ c }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in fairness %}<tr><th>{{ row.name }}<span class="sub">{{ row.better }}</span></th>
{% for cell in row.cells %}<td>{{ cell.text }}{% if cell.interval %}<span class="sub">\
{{ cell.interval }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if missing %}<details><summary>{{ missing_count }} numbers are missing\
{% if missing_count > missing | length %} (the first {{ missing | length }} are shown; summary.json
has all){% endif %}</summary><ul>
{% for m in missing %}<li>{{ m.name }}: {{ m.reason }}</li>
{% endfor %}</ul></details>{% endif %}

<h2>Failures and events</h2>
{% if not failures and not events %}<p>Nothing failed, and nothing out of the ordinary
happened.</p>{% endif %}
{% if failures %}
<p>Replies that could not be used:</p>
<div class="scroll"><table>
<thead><tr><th>Reason</th><th>replies</th><th>clients</th><th class="text">rounds</th></tr></thead>
<tbody>
{% for f in failures %}<tr><th>{{ f.reason }}</th><td>{{ f.replies }}</td><td>{{ f.clients }}</td>
<td class="text">{{ f.rounds }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if events %}
<details {% if events | length <= 12 %}open{% endif %}>
<summary>{{ event_count }} events{% if event_count > events | length %} (the last
{{ events | length }} are shown){% endif %}</summary>
<div class="scroll"><table>
<thead><tr><th>Event</th><th>phase</th><th>round</th><th class="text">what</th></tr></thead><tbody>
{% for e in events %}<tr><th>{{ e.kind }}</th><td>{{ e.phase }}</td>
<td>{% if e.phase %}{{ e.round }}{% endif %}</td>
<td class="wrap">{{ e.detail }}{% if e.client %} ({{ e.client }}){% endif %}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}

<h2>How to read this</h2>
<ul>
{% for line in reading %}<li>{{ line }}</li>
{% endfor %}</ul>

<details><summary>All settings</summary>
<dl>{% for name, text in settings %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl></details>
{% if seconds %}<details><summary>Time</summary>
<dl>{% for name, text in seconds %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl></details>{% endif %}
</main>
</body>
</html>
"""
