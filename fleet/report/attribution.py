"""Why each module was edited, by how much, and what of it is left: one page a reviewer can sort.

The rows are those of the realign steps' records; the page holds them all and shows one candidate's at a time.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fleet.core.identity import Json

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("module", "module", "The weight that was judged"),
    ("edit", "edited", "Whether the method changed it"),
    ("reason", "why", "The rule that decided"),
    ("lift", "lift", "d_out‖VᵀΔW‖² / (‖V‖²‖ΔW‖²); 1 where ΔW is indifferent to V"),
    ("rho", "ρ", "cos(VVᵀΔW, ΔW)"),
    ("rho_z", "ρ, z", "Standard deviations of ρ from its null"),
    ("cosine", "cos", "⟨ΔW, V⟩ / (‖ΔW‖‖V‖); below 0, ΔW undoes what alignment did"),
    ("delta_norm", "‖ΔW‖", "Size of the task vector before"),
    ("edit_norm", "‖edit‖", "‖ΔW_after − ΔW_before‖"),
    ("energy_kept", "energy kept", "‖ΔW_after‖² / ‖ΔW_before‖²"),
    ("rank", "rank", "LoRA rank after the edit"),
    ("recompression_residual", "residual", "What cutting the rank lost: ‖ΔW − ΔW_k‖, by Eckart and Young"),
)
"""(field of a row, heading, what it says)."""


def attribution_page(title: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A self-contained page: choose a candidate, sort by a click on a heading.

    Args:
        rows: candidate -> its module rows. `directions`, if there, holds one [before, after] pair per leading direction
            of V: its share of ‖ΔW_before‖².
    """
    depth = max((len(row.get("directions", ())) for table in rows.values() for row in table), default=0)
    heads = [*COLUMNS, *((f"u{i + 1}", f"u{i + 1}", "Share of ‖ΔW‖² along it, % before → after") for i in range(depth))]
    data = {name: [_cells(row, depth) for row in table] for name, table in rows.items()}
    header = "".join(
        f'<th title="{html.escape(help_text)}" data-column="{i}">{html.escape(heading)}</th>'
        for i, (_, heading, help_text) in enumerate(heads)
    )
    options = "".join(f"<option>{html.escape(name)}</option>" for name in rows)
    payload = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}: modules</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}: modules</h1>
<p><label>Candidate <select id="candidate">{options}</select></label>
<small>Click a heading to sort. u1, u2, … are V's leading output directions, V = aligned − unaligned.</small></p>
<main><table><thead><tr>{header}</tr></thead><tbody id="rows"></tbody></table></main>
<script id="data" type="application/json">{payload}</script><script>{_SCRIPT}</script></body></html>
"""


def _cells(row: Mapping[str, Any], depth: int) -> list[Json]:
    values: list[Json] = [row.get(name) for name, _, _ in COLUMNS]
    values[1] = "yes" if values[1] else "no"
    for before, after in row.get("directions", [])[:depth]:
        values.append(f"{100 * before:.1f} → {100 * after:.1f}")
    return values


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1c2733; }
main { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #dde3ea; white-space: nowrap; }
th { cursor: pointer; } th:first-child, td:first-child, th:nth-child(3), td:nth-child(3) { text-align: left; }
tr.no td { color: #8a96a3; } small { color: #5c6b7a; }
"""

_SCRIPT = """
const tables = JSON.parse(document.getElementById('data').textContent);
const chosen = document.getElementById('candidate'), body = document.getElementById('rows');
let column = 0, up = true;
const number = v => typeof v === 'string' ? parseFloat(v) : v;
function compare(a, b) {
  const x = a[column], y = b[column];
  if (x == null || y == null) return (x == null) - (y == null);
  const text = isNaN(number(x)) || isNaN(number(y));
  const order = text ? String(x).localeCompare(String(y), undefined, {numeric: true}) : number(x) - number(y);
  return up ? order : -order;
}
function show() {
  body.replaceChildren(...[...(tables[chosen.value] || [])].sort(compare).map(row => {
    const line = document.createElement('tr');
    line.className = row[1];
    for (const value of row) {
      const cell = document.createElement('td');
      cell.textContent = value == null ? '–' : typeof value === 'number' ? Number(value.toPrecision(4)) : value;
      line.append(cell);
    }
    return line;
  }));
}
chosen.onchange = show;
document.querySelectorAll('th').forEach(th => th.onclick = () => {
  const clicked = Number(th.dataset.column);
  up = clicked === column ? !up : true;
  column = clicked;
  show();
});
show();
"""
