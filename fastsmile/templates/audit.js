// paths and labels are JSON in attributes: a file name may hold what HTML cannot
const plan = new Map(JSON.parse(document.getElementById('plan').textContent).map(r => [r.path, r]));
const edited = new Set();
const pathOf = e => JSON.parse(e.dataset.path);
function change(path, field, value, shown) {
  if (!plan.has(path)) plan.set(path, {path, action: 'keep', reason: '', group: '', new_label: ''});
  plan.get(path)[field] = value;
  edited.add(path);
  document.querySelectorAll('select.' + (field === 'action' ? 'action' : 'label')).forEach(s => { if (pathOf(s) === path) s.value = shown; });
  document.querySelectorAll('.card[data-path]').forEach(c => c.classList.toggle('changed', edited.has(pathOf(c))));
  document.getElementById('changes').textContent = edited.size + (edited.size === 1 ? ' image' : ' images') + ' changed.';
}
document.querySelectorAll('select.action').forEach(s => s.addEventListener('change', () => change(pathOf(s), 'action', s.value, s.value)));
document.querySelectorAll('select.label').forEach(s => s.addEventListener('change', () => {
  change(pathOf(s), 'new_label', s.value ? JSON.parse(s.value) : '', s.value);
  if (s.value) change(pathOf(s), 'action', 'keep', 'keep');
}));
// as core.files writes cells: nothing that a spreadsheet would compute, quotes where they are needed
const inert = v => /^'*[=+\-@\t\r\n]/.test(v) && !/^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$/.test(v) ? "'" + v : v;
const cell = v => /[",\r\n]/.test(v) ? '"' + v.replaceAll('"', '""') + '"' : v;
function csv() {
  const columns = ['path', 'action', 'reason', 'group', 'new_label'];
  return [columns, ...[...plan.values()].map(r => columns.map(c => cell(inert(String(r[c])))))].map(r => r.join(',')).join('\n') + '\n';
}
// a byte of a file name that is not UTF-8 is a lone surrogate in the text
const bytes = text => text.split(/([\udc80-\udcff])/u).map((s, i) => i % 2 ? new Uint8Array([s.charCodeAt(0) - 0xdc00]) : s);
document.getElementById('download').addEventListener('click', () => {
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob(bytes(csv()), {type: 'text/csv'}));
  a.download = 'plan.csv';
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
});
