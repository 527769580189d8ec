"""The report page's style sheet: light and dark, readable on a phone, nothing loaded from anywhere."""

from h3scale.evaluation.report_colours import ACCENTS, DARK, GENERAL, INK, MUTED, PALETTE, PAPER, RULE, css_name

SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
  font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:56px 24px 72px}
header{margin-bottom:40px}
.eyebrow{color:var(--muted);font-size:13px;letter-spacing:.08em;text-transform:uppercase;margin:0 0 12px}
h1{font-size:clamp(28px,4.6vw,44px);line-height:1.12;letter-spacing:-.02em;margin:0 0 14px;max-width:24ch;text-wrap:balance}
.lead{font-size:18px;color:var(--muted);max-width:62ch;margin:0}
h2{font-size:24px;line-height:1.25;letter-spacing:-.01em;margin:56px 0 6px;text-wrap:balance}
h3{font-size:16px;line-height:1.35;margin:0 0 2px;text-wrap:balance}
p.note,figcaption{color:var(--muted);font-size:14px;margin:0 0 16px;max-width:70ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px;margin-top:32px}
.tile,.card,figure{background:var(--paper);border:1px solid var(--rule);border-radius:12px}
.tile{padding:18px 20px}
.tile b{display:block;font-size:34px;line-height:1.1;letter-spacing:-.02em;font-weight:650}
.tile span{display:block;color:var(--muted);font-size:14px;margin-top:6px}
.card{padding:18px 20px;margin:0 0 16px}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px;margin-bottom:16px}
.grid>.card{margin:0}
figure{margin:0;padding:18px 20px 14px}
figcaption{margin:0 0 10px}
figure svg{display:block;width:100%;height:auto;max-width:560px;overflow:visible}
.wide figure{overflow-x:auto;margin-bottom:16px}
.wide figure svg{min-width:720px;max-width:none}
table{border-collapse:separate;border-spacing:3px;width:100%;font-size:15px}
th{font-weight:600;text-align:right;padding:6px 10px;white-space:nowrap}
th[scope=row],thead th:first-child{text-align:left;padding-left:0}
tbody th small,td small{display:block;font-weight:400;color:var(--muted);font-size:12px;line-height:1.35}
td{text-align:right;padding:7px 10px;border-radius:6px;white-space:nowrap}
td.best{font-weight:700;box-shadow:inset 0 0 0 1.5px currentColor}
tr.main th{font-weight:700}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}
.pair{display:grid;grid-template-columns:170px 1fr 150px;gap:4px 16px;align-items:center;font-size:15px;padding:5px 0}
.pair>:last-child{text-align:right}
.pair small{color:var(--muted);font-size:12px;display:block;line-height:1.3}
.track{position:relative;height:20px;min-width:80px}
.track i{position:absolute;top:50%;transform:translateY(-50%)}
.track .zero{width:1px;height:26px;background:var(--muted)}
.track .span{height:4px;border-radius:2px;background:var(--ink);opacity:.45}
.track .mean{width:10px;height:10px;border-radius:50%;margin-left:-5px;background:var(--ink)}
.sample{border-top:4px solid var(--accent)}
.sample dl{margin:0;display:grid;gap:10px}
.sample dt{color:var(--muted);font-size:12px;letter-spacing:.04em;text-transform:uppercase}
.sample dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.sample .top{display:flex;justify-content:space-between;font-size:14px;margin-bottom:10px;font-weight:600}
.no{color:var(--muted);font-weight:400}
.mix{display:flex;height:10px;border-radius:5px;overflow:hidden;margin:2px 0 6px;gap:2px}
.mix i{display:block;height:100%}
.keys{font-size:13px;color:var(--muted);display:flex;flex-wrap:wrap;gap:2px 14px}
footer{margin-top:64px;padding-top:20px;border-top:1px solid var(--rule);color:var(--muted);font-size:14px}
footer p{max-width:76ch;margin:0 0 8px}
@media(max-width:560px){
  main{padding:32px 16px 48px}
  h2{margin-top:44px;font-size:21px}
  .card,figure{padding:14px}
  table,thead,tbody{display:block}
  tr{display:grid;grid-template-columns:repeat(var(--columns),minmax(64px,1fr));gap:2px}
  tr>:first-child{grid-column:1/-1;padding:10px 0 2px}
  thead tr{align-items:end}
  thead tr>:first-child{display:none}
  th,td{padding:6px;white-space:normal;font-size:14px}
  thead th{font-size:12px;padding:6px 2px;text-align:left}
  thead .dot{display:block;width:100%;height:3px;border-radius:2px;margin:0 0 6px}
  td small{font-size:11px}
  .matrix tr{grid-template-columns:90px repeat(var(--columns),minmax(52px,1fr))}
  .matrix tr>:first-child{grid-column:auto;padding:6px 0;display:block}
  .tiles{grid-template-columns:1fr 1fr;gap:10px}
  .tile{padding:14px}
  .tile b{font-size:26px}
  .pair{grid-template-columns:1fr auto}
  .pair .track{grid-row:2;grid-column:1/-1}
}
@media print{body{background:#fff}.card,figure,.tile{break-inside:avoid}}
"""


def style_sheet() -> str:
    """The whole sheet: the colours as variables (the pictures use them too), then the rules."""
    light = {colour: colour for colour in (INK, MUTED, RULE, PAPER, GENERAL, *ACCENTS.values(), *PALETTE)}
    names = {"--ink": INK, "--muted": MUTED, "--rule": RULE, "--paper": PAPER}
    return (
        f":root{{color-scheme:light dark;--ground:#f6f7f9;{_variables(light, names)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{--ground:#0f1217;{_variables(DARK, names)}}}}}{SHEET}"
    )


def _variables(colours: dict[str, str], names: dict[str, str]) -> str:
    pairs = [(css_name(key), value) for key, value in colours.items()] + [(name, colours[key]) for name, key in names.items()]
    return "".join(f"{name}:{value};" for name, value in pairs)
