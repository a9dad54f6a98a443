"""Colours and layout of pages, for light and dark screens; a page as a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from errors import UserError

_SEQUENTIAL = "#edf4fd #d8e7fb #bdd6f7 #9ec3f2 #7cadeb #5a96e2 #3d7fd6 #2a69c0 #1d54a3 #143f80 #0c2c5e"
"""From even (near the page) to the busiest: one hue, so that more is darker. Turned round on a dark page."""
_SEQUENTIAL_DARK = "#1a2431 #1c2f47 #1e3b5f #214878 #265793 #2f68ad #3f7cc6 #5891da #79a9e8 #9fc3f2 #c9def9"
_DIVERGING = "#1d54a3 #3d7fd6 #6fa5e6 #a3c6ef #d3e2f3 #ecebe8 #f6ddd0 #f0b99f #e48f69 #cf6237 #a5441c"
"""Below even, even, above even: two hues that meet in grey."""
_DIVERGING_DARK = "#6aa5f0 #4a86d4 #3a6aab #305282 #2b3d57 #32312f #533a2c #7b4a31 #a85f39 #d67c4c #f39f74"


def _levels(kind: str, colors: str) -> str:
    return "".join(f".{kind}{i}{{fill:{color};background:{color}}}" for i, color in enumerate(colors.split()))


STYLE = f"""
:root{{--page:#f7f6f3;--card:#fff;--ink:#1d1c1a;--quiet:#6a6862;--grid:#e9e7e2;--axis:#c3c0b8;
--c1:#2a6fd0;--c2:#d9601f;--c3:#15916a;--c4:#8a4fc4;--bad:#c92a2a}}
{_levels("s", _SEQUENTIAL)}{_levels("d", _DIVERGING)}
@media (prefers-color-scheme:dark){{
:root{{--page:#141413;--card:#1d1d1b;--ink:#f0efeb;--quiet:#a3a099;--grid:#302f2c;--axis:#55534e;
--c1:#6aa5f0;--c2:#f08a4b;--c3:#3fbd92;--c4:#b790ee;--bad:#ff7b72}}
{_levels("s", _SEQUENTIAL_DARK)}{_levels("d", _DIVERGING_DARK)}}}
*{{box-sizing:border-box}}
body{{margin:0;padding:28px;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,sans-serif;
font-variant-numeric:tabular-nums}}
body>*{{max-width:1320px;margin:0 auto 20px}}
nav{{display:flex;flex-wrap:wrap;gap:4px 24px}}
nav a{{color:var(--c1);font-weight:600}}
nav~header:not(:nth-child(2)){{border-top:1px solid var(--axis);margin-top:44px;padding-top:28px}}
h1{{font-size:24px;margin:0 0 14px}}
h2{{font-size:15px;font-weight:600;margin:0;flex-basis:100%}}
dl{{display:flex;flex-wrap:wrap;gap:10px 36px;margin:0}}
dt{{color:var(--quiet);font-size:13px}}
dd{{margin:0;font-size:24px;font-weight:600;line-height:1.2}}
main{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px;align-items:start}}
figure,table{{background:var(--card);border-radius:10px;padding:16px 18px 12px;margin:0;min-width:0}}
figcaption{{display:flex;flex-wrap:wrap;gap:4px 18px;place-items:start;place-content:start;
margin-bottom:8px;min-height:52px}}
ul{{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0;padding:0;font-size:13px;color:var(--quiet)}}
li b{{color:var(--ink);font-weight:600}}
li i{{display:inline-block;vertical-align:middle;margin:-2px 6px 0 0}}
.key{{width:16px;height:3px;border-radius:2px}}
.k1{{background:var(--c1)}}.k2{{background:var(--c2)}}.k3{{background:var(--c3)}}.k4{{background:var(--c4)}}
.triangle{{border:5px solid transparent;border-top:0;border-bottom:8px solid var(--bad)}}
.dash{{width:16px;border-top:2px dashed var(--quiet)}}
svg{{display:block;width:100%;height:auto}}
text{{font-size:12px;fill:var(--quiet)}}
.grid{{stroke:var(--grid)}}.axis{{stroke:var(--axis)}}
.c1{{stroke:var(--c1);fill:var(--c1)}}.c2{{stroke:var(--c2);fill:var(--c2)}}.c3{{stroke:var(--c3);fill:var(--c3)}}
.c4{{stroke:var(--c4);fill:var(--c4)}}
.line,.faint{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.faint{{stroke-width:1;opacity:.35}}
.band{{stroke:none;opacity:.22}}
.dot{{stroke:var(--card);stroke-width:1.5}}
.resumed{{stroke:var(--quiet);stroke-dasharray:4 4;opacity:.8}}
.skipped{{fill:var(--bad)}}
.hit{{fill:var(--ink);opacity:0}}.hit:hover{{opacity:.08}}
rect:not(.hit):hover{{stroke:var(--ink)}}
.bar{{width:170px;font-size:12px;color:var(--quiet)}}
.swatches{{display:flex;border-radius:3px;overflow:hidden}}
.swatches i{{flex:1;height:10px}}
.ticks{{display:flex;justify-content:space-between;line-height:1.3}}
em{{font-style:normal;font-size:13px;color:var(--quiet)}}
section{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:16px;align-items:start}}
table{{width:100%;border-spacing:0;font-size:14px}}
thead th{{color:var(--ink);font-weight:600;font-size:15px;padding-bottom:6px}}
th{{text-align:left;font-weight:400;color:var(--quiet);white-space:nowrap;padding:2px 16px 2px 0;vertical-align:top}}
td{{width:100%;overflow-wrap:anywhere;padding:2px 0}}
details{{margin:0 0 10px}}
summary{{cursor:pointer;color:var(--quiet);font-size:14px;padding:4px 0}}
details>div{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:12px;margin-top:6px}}
article{{background:var(--card);border-radius:10px;padding:12px 16px;min-width:0;font-size:14px}}
article p{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:16em;overflow-y:auto}}
article .prompt{{color:var(--quiet);margin-bottom:6px;max-height:8em}}
article b{{float:right;margin-left:10px;font-weight:600}}
@media (max-width:600px){{body{{padding:14px}}svg{{overflow:visible}}text{{font-size:16px}}}}
@media print{{body{{background:none;padding:0}}figure,table{{break-inside:avoid}}}}
"""


def whole_page(title: str, body: str) -> str:
    """A page that needs nothing beside it. Both are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title} - qmax</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def save_page(path: Path, page: str) -> None:
    """Writes a page, whole or not at all. Raises UserError where it cannot be written."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as exc:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({exc.strerror}); make room or make it writable") from exc
