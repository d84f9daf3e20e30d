// tables: candidate -> rows of cells, a cell for each heading; the second cell says whether the module was edited.
const tables = JSON.parse(document.getElementById('data').textContent);
const chosen = document.getElementById('candidate'), body = document.getElementById('rows');
let column = 0, up = true;
const number = v => typeof v === 'string' ? parseFloat(v) : v;
// Missing values come last in both directions, and numbers that text begins with count as numbers.
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
