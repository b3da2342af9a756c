"""The style of report.html: light and dark, on a phone and on paper."""

from __future__ import annotations

from .charts import COLORS

STYLE = """
:root {
  --page: #ffffff; --ink: #1b1f24; --soft: #5b6570; --rule: #dde2e7; --panel: #f5f7f9;
  LIGHT_KINDS
}
.blue { --q0: #e6eff8; --q1: #d0e1f2; --q2: #b2d0e8; --q3: #8cbbdd; --q4: #66a5d1;
  --q5: #3f86bd; --q6: #256ba9; --q7: #134f8c; --q8: #08306b; --low: #1b1f24; --high: #ffffff; }
.orange { --q0: #fdf0e2; --q1: #fcdfc0; --q2: #fbc898; --q3: #f6aa69; --q4: #ec8b43;
  --q5: #d66c22; --q6: #b34f12; --q7: #8a390c; --q8: #5f2506; --low: #1b1f24; --high: #ffffff; }
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --rule: #313943; --panel: #1d232a;
    --c0: #ff8a4c; --c1: #56b4e9; --c2: #2fc79b; --c3: #e08fc0; --c4: #e3bf3f; --c5: #b6c2cf;
  }
  .blue { --q0: #1b2a3a; --q1: #1f3a55; --q2: #234b71; --q3: #2a5f8f; --q4: #3777ad;
    --q5: #5394c8; --q6: #7cb1dc; --q7: #a9cdec; --q8: #d8eafa; --low: #e4e8ec; --high: #14181d; }
  .orange { --q0: #33241a; --q1: #4b2f1b; --q2: #663b1a; --q3: #854a1a; --q4: #a65d20;
    --q5: #c9783a; --q6: #e39a60; --q7: #f2bd90; --q8: #fce0c6; --low: #e4e8ec; --high: #14181d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 24px 28px 56px; }
.sections { columns: 2 560px; column-gap: 44px; }
.sections > section { break-inside: avoid; overflow: hidden; }
header p { max-width: 75ch; }
.verdict { color: var(--ink); font-size: 1.05rem; margin: 0 0 .3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 1.9rem 0 .4rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; }
.card { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 12px; }
.card span, .card small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35; }
.card b { display: block; font-size: 1.3rem; line-height: 1.5; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; max-width: 100%; margin: .4rem 0 .8rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.names2 th:nth-child(2), .names2 td:nth-child(2) { text-align: left; }
.names2 { font-size: .8rem; } .names2 th, .names2 td { padding-right: 7px; }
.total tbody tr:last-child td { font-weight: 600; border-bottom: 0; }
td svg { vertical-align: middle; }
.chosen { font-style: normal; font-size: .75rem; font-weight: 600; padding: 1px 7px;
  margin-left: 4px; border-radius: 9px; color: var(--page); background: var(--c1); }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px;
  font-size: .875rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: center; }
svg { display: block; } td svg { display: inline-block; }
svg.heat, svg.plot { max-width: 100%; height: auto; }
svg.wide { min-width: 620px; } svg.plot { min-width: 400px; }
svg text { font-size: 11px; fill: var(--soft); } svg text.small { font-size: 9.5px; }
svg text.axis { fill: var(--ink); }
.heat .q0 { fill: var(--q0); } .heat .q1 { fill: var(--q1); } .heat .q2 { fill: var(--q2); }
.heat .q3 { fill: var(--q3); } .heat .q4 { fill: var(--q4); } .heat .q5 { fill: var(--q5); }
.heat .q6 { fill: var(--q6); } .heat .q7 { fill: var(--q7); } .heat .q8 { fill: var(--q8); }
svg text.on0, svg text.on1, svg text.on2, svg text.on3, svg text.on4 { fill: var(--low); }
svg text.on5, svg text.on6, svg text.on7, svg text.on8 { fill: var(--high); }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); }
.c3 { fill: var(--c3); } .c4 { fill: var(--c4); } .c5 { fill: var(--c5); }
.plot path { stroke: var(--page); stroke-width: .8; }
.grid { stroke: var(--rule); } .dashed { stroke: var(--soft); stroke-dasharray: 4 4; }
.curve { fill: none; stroke: var(--c5); stroke-width: 2; stroke-linejoin: round; }
.range { stroke: var(--c1); stroke-width: 2; }
.sideways { display: none; font-size: .8rem; color: var(--soft); }
.scroll { background: linear-gradient(to right, var(--page) 40%, transparent) left / 40px 100%
    no-repeat local, linear-gradient(to left, var(--page) 40%, transparent) right / 40px 100%
    no-repeat local, linear-gradient(to right, var(--rule), transparent) left / 14px 100%
    no-repeat scroll, linear-gradient(to left, var(--rule), transparent) right / 14px 100%
    no-repeat scroll; }
@media screen and (max-width: 676px) { .sideways { display: block; } }
@media (max-width: 480px) {
  main { padding: 16px 14px 40px; }
  .cards { grid-template-columns: 1fr 1fr; }
  th, td { white-space: normal; padding: 4px 5px; }
  th:first-child, td:first-child { overflow-wrap: anywhere; min-width: 6em; }
  svg.plot { min-width: 0; } td svg.interval { width: 90px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
}
@media print {
  @page { margin: 15mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  .sections { columns: auto; } .sections > section { break-inside: auto; overflow: visible; }
  h2, h3, h2 + p { break-after: avoid; } table, .card, .pair, svg { break-inside: avoid; }
  .scroll { overflow: visible; } svg.wide, svg.plot { min-width: 0; }
  .card, pre, .chosen, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".replace("LIGHT_KINDS", " ".join(f"--c{i}: {color};" for i, color in enumerate(COLORS)))
