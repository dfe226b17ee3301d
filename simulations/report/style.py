"""The report's style sheet: two palettes, one type scale, one column on a phone, and rules for paper."""

from __future__ import annotations

from simulations.report.markup import Markup

LIGHT = {
    "paper": "#f4f5f2",
    "card": "#ffffff",
    "ink": "#14211d",
    "soft": "#52605a",
    "rule": "#dde1dc",
    "grid": "#e8ebe7",
    "a": "#0b6b57",
    "b": "#a2480c",
    "c": "#3b4fb8",
    "alarm": "#a8161b",
    "on-alarm": "#ffffff",
    "wash": "#e3efe9",
}
DARK = {
    "paper": "#0e1412",
    "card": "#161e1b",
    "ink": "#e9efec",
    "soft": "#a2b0aa",
    "rule": "#29342f",
    "grid": "#232d29",
    "a": "#4fd0ae",
    "b": "#f2a65a",
    "c": "#9fb0ff",
    "alarm": "#ff8b84",
    "on-alarm": "#250404",
    "wash": "#1a2b25",
}


def _palette(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"


_RULES = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 56px; }
h1, h2, h3, p, figure, dl, dd, pre { margin: 0; }
section { margin-top: 44px; }
section h2 { font-size: 21px; line-height: 1.25; letter-spacing: -0.01em; margin-bottom: 14px; }

.brand { color: var(--a); font-size: 13px; font-weight: 600; letter-spacing: 0.02em; }
h1 { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; margin-top: 4px; font-size: 34px;
  line-height: 1.15; letter-spacing: -0.02em; overflow-wrap: anywhere; }
.chip { padding: 3px 10px; border: 1px solid var(--rule); border-radius: 99px; background: var(--card);
  color: var(--soft); font-size: 13px; font-weight: 600; letter-spacing: 0; }
.chip.alarm { border-color: var(--alarm); background: var(--alarm); color: var(--on-alarm); }
.facts { margin-top: 6px; color: var(--soft); }

.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin-top: 24px; overflow: hidden;
  border: 1px solid var(--rule); border-radius: 14px; background: var(--rule); }
.tile { padding: 16px 20px 18px; background: var(--card); }
.tile.wide { grid-column: span 2; background: var(--wash); }
.tile-name { color: var(--soft); font-size: 14px; }
.value { margin-top: 2px; font-size: 25px; font-weight: 650; line-height: 1.3; letter-spacing: -0.02em; }
.wide .value { font-size: 44px; line-height: 1.15; }
.before, .arrow { color: var(--soft); font-weight: 400; }
.note { color: var(--soft); font-size: 14px; }
.strong { color: var(--a); font-weight: 650; }
.warn { color: var(--alarm); font-weight: 650; }

.card .note, .scroll + .note { margin-top: 10px; }
.columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; align-items: stretch; }
.card { padding: 18px 20px 14px; border: 1px solid var(--rule); border-radius: 14px;
  background: var(--card); }
.card h3 { font-size: 16px; line-height: 1.3; }
.card figcaption { margin-bottom: 12px; }
.card figcaption p, .absent { color: var(--soft); font-size: 14px; line-height: 1.4; }
.absent { padding: 24px 0 20px; }

.privacy { border: 1px solid var(--rule); border-radius: 14px; background: var(--card); overflow: hidden; }
.privacy .columns > div { padding: 22px 0 22px 24px; }
.privacy .card { border: 0; }
.privacy .pairs { margin: 8px 24px 24px; }
.statement { font-size: 17px; line-height: 1.5; }
.stamped { border: 2px solid var(--alarm); }
.stamps { padding: 16px 24px; background: var(--alarm); color: var(--on-alarm); print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.stamp { font-size: 24px; font-weight: 800; line-height: 1.3; letter-spacing: 0.01em; }
.raw { padding: 22px 22px 22px; border: 2px dashed var(--soft); border-radius: 16px; }
.label { margin-bottom: 16px; color: var(--soft); }
.label strong { color: var(--alarm); }

.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px 20px;
  margin-top: 18px; }
.pairs div { padding-top: 8px; border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
.pairs dt { color: var(--soft); font-size: 13px; }
.pairs dd { font-weight: 600; }

svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12.5px; }
svg text { fill: var(--soft); }
svg .name { font-size: 12px; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--soft); }
svg .reference { stroke: var(--soft); stroke-dasharray: 2 3; stroke-width: 1.2; }
.tone-a { --tone: var(--a); --dash: none; }
.tone-b { --tone: var(--b); --dash: 7 3; }
.tone-c { --tone: var(--c); --dash: 2 2.5; }
.tone-d { --tone: var(--ink); --dash: 9 3 2 3; }
.tone-e { --tone: var(--soft); --dash: 5 4; }
.tone-f { --tone: var(--soft); --dash: 1.5 4; }
svg .line { fill: none; stroke: var(--tone); stroke-width: 2.2; stroke-linejoin: round;
  stroke-dasharray: var(--dash); }
svg .dense { stroke-width: 1.2; stroke-dasharray: none; }
svg .area { fill: var(--tone); opacity: 0.1; }
svg .mark { fill: var(--tone); stroke: var(--card); stroke-width: 1.5; }
svg .ring { fill: none; stroke: var(--tone); stroke-width: 2.4; }
svg .label { fill: var(--tone); font-weight: 650; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round; }
svg .label.quiet { fill: var(--soft); font-weight: 500; }
.probes rect { fill: transparent; }
.probes line { stroke: var(--soft); opacity: 0; }
.probes circle { fill: var(--tone); stroke: var(--card); stroke-width: 1.5; opacity: 0; }
.probes g:hover line { opacity: 0.5; }
.probes g:hover circle { opacity: 1; }
svg .bar-name { fill: var(--ink); }
svg .bar-value { fill: var(--ink); font-weight: 650; }
.bar { fill: var(--a); }
.track { fill: var(--grid); }
.hatch-ground { fill: var(--card); }
.hatch-line { fill: var(--b); }

details { border-top: 1px solid var(--rule); }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { padding: 13px 2px; font-weight: 600; cursor: pointer; }
summary:hover { color: var(--a); }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
details > :last-child { margin: 4px 0 20px; }
.scroll, pre { overflow: auto; max-height: 70vh; border: 1px solid var(--rule); border-radius: 10px;
  background: var(--card); }
pre { padding: 16px 20px; font: 13.5px/1.55 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; white-space: nowrap; }
th, td { padding: 6px 12px; text-align: right; }
th { color: var(--soft); font-weight: 600; }
thead { position: sticky; top: 0; background: var(--card); box-shadow: 0 1px var(--rule); }
th.group { padding-bottom: 0; color: var(--alarm); font-size: 12px; text-align: left; }
tbody tr:nth-child(even) { background: var(--paper); }
footer { margin-top: 32px; color: var(--soft); font-size: 13.5px; }
"""

_NARROW = """
main { padding: 24px 14px 40px; }
section { margin-top: 32px; }
h1 { font-size: 27px; }
.tiles { grid-template-columns: repeat(2, 1fr); }
.tile { padding: 12px 14px 14px; }
.value { font-size: 20px; }
.stamps { padding: 14px 16px; }
.stamp { font-size: 20px; }
.wide .value { font-size: 36px; }
.columns { grid-template-columns: minmax(0, 1fr); }
.card { padding: 14px 14px 10px; }
.privacy .columns > div { padding: 18px 16px 0; }
.privacy .pairs { margin: 8px 16px 18px; }
.raw { padding: 14px; margin-left: -6px; margin-right: -6px; }
svg, svg .name { font-size: 15px; }
"""

_PAPER = """
@page { margin: 14mm; }
body { font-size: 11pt; background: none; }
main { max-width: none; padding: 0; }
.card, .tiles, .privacy, tr { break-inside: avoid; }
h2 { break-after: avoid; }
.probes { display: none; }
.scroll, pre { max-height: none; overflow: visible; white-space: pre-wrap; }
thead { position: static; }
table { font-size: 6.5pt; }
th, td { padding: 1px 3px; white-space: normal; }
details::details-content { content-visibility: visible; block-size: auto; }
"""

STYLE = Markup(
    _palette(LIGHT)
    + _RULES
    + f"@media (max-width: 720px) {{{_NARROW}}}\n"
    + f"@media screen and (prefers-color-scheme: dark) {{{_palette(DARK)}}}\n"
    + f"@media print {{{_PAPER}}}\n"
)
