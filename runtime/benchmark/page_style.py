"""The style sheet of the report page. It loads no font, image or script; text has a contrast of 4.5 to 1 or more."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--bg:#f6f7f9;--panel:#fff;--ink:#1b1f24;--muted:#57606a;--line:#dde1e6;--soft:#eceff3;--bad:#b42318;--good:#0f6b3d;
--warn:#fff6e0;--c0:#0b62c4;--c1:#b45309;--c2:#0f766e;--c3:#7e22ce;--c4:#be123c;--c5:#4d7c0f;--c6:#57534e;--c7:#0e7490}
@media (prefers-color-scheme:dark){:root{--bg:#0f1215;--panel:#171b20;--ink:#e7eaee;--muted:#a3abb5;--line:#2b3138;
--soft:#20262c;--bad:#ff8a7a;--good:#5fd39a;--warn:#2b2412;--c0:#66a9ff;--c1:#f5b04c;--c2:#3fd0c0;--c3:#c792ff;
--c4:#ff7f93;--c5:#a9d54a;--c6:#c9c2ba;--c7:#5cd0ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 6px}
h3{font-size:14px;margin:18px 0 6px}
p{margin:0 0 12px;color:var(--muted)}
header p strong{color:var(--ink)}
pre{margin:0 0 20px;padding:8px 12px;background:var(--soft);border-radius:8px;overflow-x:auto;font-size:13px}
section{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0 0 18px}
section.warn{background:var(--warn)}
.warn ul{margin:0;padding-left:20px}
.bad{color:var(--bad)}
.tiles{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:16px}
.tiles strong{display:block;font-size:26px;letter-spacing:-.02em;line-height:1.25}
.tiles span{color:var(--muted);font-size:13px;line-height:1.35;display:block}
.lanes{display:grid;grid-template-columns:minmax(120px,210px) 1fr minmax(112px,auto);gap:4px 14px;align-items:center}
.group{grid-column:1/-1;margin:12px 0 2px;padding-top:8px;border-top:1px solid var(--line)}
.group:first-child{border:0;padding-top:0;margin-top:0}
.label{font-size:13px;color:var(--muted);overflow-wrap:anywhere;line-height:1.3}
.plot{min-width:0}
.figure{font-size:13px;text-align:right;white-space:nowrap}
small{color:var(--muted)}
svg{display:block;width:100%;overflow:visible}
svg.lane{overflow:hidden}
.lane path,.lane rect{vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.dots{fill:none;stroke:currentColor;stroke-width:4.5;stroke-linecap:round;opacity:.5}
.p50,.p90,.p99,.ratio{fill:none;stroke:var(--ink);stroke-width:2.5}
.p90{stroke-width:1.5;stroke-dasharray:5 3}
.p99{stroke-width:1.5;stroke-dasharray:1.5 3}
.interval{fill:var(--ink);opacity:.16}
.margin{fill:var(--muted);opacity:.2}
.fill{fill:currentColor}
.half{opacity:.5}.faint{opacity:.22}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.thin{stroke-width:1.4;opacity:.75}
.line.probe{stroke:var(--ink);stroke-width:2.5;stroke-dasharray:6 4}
.point{fill:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.v-faster,.v-less{color:var(--good)}.v-slower,.v-more{color:var(--bad)}.v-no-difference,.v-too-few-rounds{color:var(--muted)}
.ratio{stroke:currentColor}
.axis{position:relative;height:20px;font-size:12px;color:var(--muted)}
.tick{position:absolute;top:2px;transform:translateX(-50%);white-space:nowrap}
.tick.first{transform:none}.tick.last{transform:translateX(-100%)}
.axis .unit{position:absolute;right:-14px;top:2px;transform:translateX(100%);white-space:nowrap}
.over{position:relative;border-left:1px solid var(--line);border-bottom:1px solid var(--line)}
.over span{position:absolute;left:6px;font-size:12px;color:var(--muted)}
.over .high{top:0}.over .low{bottom:0}
.key{display:inline-block;width:14px;height:12px;background:currentColor;border-radius:3px;margin-right:6px;
vertical-align:-1px}
.k50,.k90,.k99{background:none;border-left:2.5px solid var(--ink);border-radius:0;width:4px;margin:0 2px 0 6px}
.k90{border-left:2px dashed var(--ink)}.k99{border-left:2px dotted var(--ink)}
.key.probe{background:none;border-top:2.5px dashed var(--ink);border-radius:0;height:4px;width:20px;vertical-align:3px}
.legend{list-style:none;margin:0 0 10px;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:18px}
figure{margin:0;max-width:420px}
figcaption{font-size:13px;font-weight:600}
.small{font-size:11.5px;fill:var(--muted)}
.scroll{overflow-x:auto;margin:0 -20px;padding:0 20px}
table{border-collapse:collapse;font-size:13px;white-space:nowrap}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600}
tbody th,thead th:first-child{text-align:left;font-weight:500;position:sticky;left:-20px;background:var(--panel)}
dl{display:grid;grid-template-columns:minmax(130px,220px) 1fr;gap:4px 16px;margin:0;font-size:13px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
abbr{text-decoration:none;color:var(--bad);margin-left:2px}
@media (max-width:720px){main{padding:18px 12px 40px}section{padding:14px}
.lanes{grid-template-columns:1fr auto;grid-auto-flow:row dense;gap:2px 10px}.label{grid-column:1;padding-top:6px}
.figure{grid-column:2;padding-top:6px}.plot{grid-column:1/-1}
.axis .unit{right:0;top:18px;transform:none}.axis{height:36px}
dl{grid-template-columns:1fr}dt{margin-top:6px}.scroll{margin:0 -14px;padding:0 14px}tbody th,thead th:first-child{
left:-14px;max-width:46vw;white-space:normal}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
