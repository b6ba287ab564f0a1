"""The frame of a report: style sheet, head, list of sections."""

from collections.abc import Sequence
import datetime
import html

CSS = """
:root {
  --page: #ffffff; --card: #f6f8fa; --line: #d8dee6; --text: #1b2430; --soft: #566373;
  --accent: #0b62b5; --heat0: #eef3f8; --heat1: #0b4f9e;
  --ink: #000000; --strong: #ffffff;
  --good: #0f7b5f; --bad: #b3261e;
  --c0: #0b62b5; --c1: #c2410c; --c2: #0f7b5f; --c3: #8a3fb0; --c4: #866a00; --c5: #475569;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10161d; --card: #19212b; --line: #313c4a; --text: #e8edf3; --soft: #a3b0bf;
    --accent: #6db3ff; --heat0: #1f2935; --heat1: #86c8ff;
    --ink: #ffffff; --strong: #000000;
    --good: #4fd1a5; --bad: #ff9a92;
    --c0: #6db3ff; --c1: #ff9d66; --c2: #4fd1a5; --c3: #d3a1f0; --c4: #e6c34d; --c5: #b4c0cd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif;
}
main, header { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; text-wrap: balance;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 14px; }
h3 { font-size: 1rem; margin: 22px 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.note, .date { color: var(--soft); font-size: .875rem; }
.note { margin-top: 10px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; padding: 0;
  list-style: none; }
nav a { display: inline-block; padding: 4px 0; }
section { margin: 34px 0 0; padding-top: 26px; border-top: 1px solid var(--line); }
section > :last-child { margin-bottom: 0; }
footer { max-width: 1180px; margin: 40px auto 0; padding: 0 24px 40px; color: var(--soft);
  font-size: .875rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 6px; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
dt { color: var(--soft); font-size: .875rem; }
.facts dd { margin: 2px 0 0; font-size: 1.35rem; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.3; }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--card); font-weight: 600; color: var(--soft); font-size: .875rem; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); }
.number { text-align: right; }

.charts, .maps { display: grid; gap: 26px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.chart, .map { display: block; width: 100%; height: auto; overflow: visible; }
.chart { max-width: 480px; }
.map { max-width: 420px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.tick { fill: var(--soft); font-size: 12px; } .mid { text-anchor: middle; }
.end { text-anchor: end; }
.line path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line circle { fill: var(--c); }
.line.train path { stroke-width: 1.2; opacity: .75; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.s1 path { stroke-dasharray: 7 3; } .s2 path { stroke-dasharray: 2 3; }
.s3 path { stroke-dasharray: 9 3 2 3; } .s4 path { stroke-dasharray: 12 4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 6px 0 12px;
  padding: 0; font-size: .875rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 7px; }
.legend svg { flex: none; }

.heat { fill: color-mix(in srgb, var(--heat1) var(--v), var(--heat0)); stroke: var(--page); }
.none { fill: none; stroke: var(--line); }
text.number { fill: var(--ink); font-size: 11px; }
.scale { display: flex; align-items: center; gap: 10px; font-size: .875rem; color: var(--soft);
  margin: 14px 0 0; }
.ramp { width: 140px; height: 12px; border-radius: 3px;
  background: linear-gradient(to right, var(--heat0), var(--heat1)); }

.confusion { width: auto; font-size: .875rem; border-collapse: separate; border-spacing: 2px; }
.confusion th, .confusion td { border: 0; padding: 5px 8px; background: none; }
.confusion thead th { vertical-align: bottom; padding: 8px 4px; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion tbody th { background: var(--page); text-align: right; }
.scroll:has(.confusion) { width: fit-content; max-width: 100%; }
.confusion tbody td { text-align: center; min-width: 38px; border-radius: 4px;
  background: color-mix(in srgb, var(--heat1) var(--v, 0%), var(--heat0)); color: var(--ink); }
.confusion td.right { outline: 2px solid var(--text); outline-offset: -2px; }
.confusion td.total { background: none; color: inherit; font-weight: 600; text-align: right; }

.pictures { display: grid; gap: 26px; }
.picture .scroll { width: fit-content; background: #ffffff; }
.picture img { display: block; height: auto; max-width: max(100%, var(--least)); }

.samples { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); }
.samples img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  border-radius: 6px; background: var(--card); }
.samples figure { border: 2px solid var(--line); border-radius: 10px; padding: 8px; }
.samples .wrong { border: 2px dashed var(--bad); }
.samples figcaption { font-weight: 400; font-size: .875rem; line-height: 1.4; margin: 8px 0 0;
  overflow-wrap: anywhere; hyphens: auto; }
.right b { color: var(--good); } .wrong b { color: var(--bad); }
.was { color: var(--soft); }
.skipped { overflow-wrap: anywhere; }

pre { margin: 0; padding: 14px 16px; font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo,
  Consolas, 'DejaVu Sans Mono', monospace; }
.command { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.command span { display: inline-block; max-width: 100%; vertical-align: top; }
.versions { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 16px 0; }
.versions dd { margin: 0; }
details { margin-top: 18px; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
details[open] summary { margin-bottom: 8px; }

@media (prefers-color-scheme: light) {
  .confusion td.on-light, text.number.on-light { color: var(--strong); fill: var(--strong); }
}
@media (prefers-color-scheme: dark) {
  .confusion td.on-dark, text.number.on-dark { color: var(--strong); fill: var(--strong); }
}
@media (max-width: 600px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 24px; }
  h1 { font-size: 1.5rem; }
  section { margin-top: 26px; padding-top: 22px; }
  .facts { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  .facts div { padding: 10px 12px; }
  .facts dd { font-size: 1.125rem; }
  .samples { grid-template-columns: repeat(2, 1fr); gap: 10px; }
  .maps { justify-items: center; }
  .map { max-width: 330px; }
}
@media print {
  section { break-inside: avoid-page; }
  nav { display: none; }
}
"""


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
  """The whole text of a page: sections are (key, name, inner HTML)."""
  now = datetime.datetime.now(datetime.UTC)
  links = ''.join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
  body = ''.join(
    f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>{text}'
    '</section>\n'
    for key, name, text in sections
  )
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p class="date">Written <time datetime="{now.isoformat(timespec='seconds')}">{now:%d %B %Y, %H:%M}
UTC</time> by fqjax</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}</main>
<footer>One file, no external parts: it can be kept, mailed and opened anywhere.</footer>
</body>
</html>
"""
