// paths and labels are JSON in attributes: a file name may hold what HTML cannot
const plan = new Map(JSON.parse(document.getElementById('plan').textContent).map(r => [r.path, r]));
const before = new Map([...plan].map(([path, row]) => [path, {...row}]));
const edited = new Set(), history = [];
const pathOf = e => JSON.parse(e.dataset.path);
const labels = JSON.parse(document.getElementById('labels').textContent);
const cards = [...document.querySelectorAll('.card[data-path]')];
const cardsOf = Map.groupBy ? Map.groupBy(cards, pathOf) : cards.reduce((m, c) => m.set(pathOf(c), [...m.get(pathOf(c)) ?? [], c]), new Map());

// the row of an image becomes what it was, or something else
function put(path, row) {
  const old = before.get(path), same = row && old && ['action', 'new_label'].every(k => row[k] === old[k]);
  if (row && (old || row.action !== 'keep' || row.new_label)) plan.set(path, row); else plan.delete(path);
  if (same || !plan.has(path) && !old) edited.delete(path); else edited.add(path);
  for (const card of cardsOf.get(path) ?? []) {
    card.querySelector('select.action').value = row?.action ?? 'keep';
    const list = card.querySelector('select.label');
    list.value = [...list.options].find(o => row?.new_label && o.value && JSON.parse(o.value) === row.new_label)?.value ?? '';
    card.classList.toggle('changed', edited.has(path));
  }
  document.getElementById('changes').textContent = edited.size + (edited.size === 1 ? ' image' : ' images') + ' changed.';
  document.getElementById('undo').disabled = !history.length;
}
function change(path, fields) {
  const row = plan.get(path);
  history.push([path, row && {...row}]);
  const made = {path, action: 'keep', reason: '', group: '', new_label: '', ...row, ...fields};
  const lacksLabel = !made.new_label && JSON.parse(cardsOf.get(path)[0].dataset.label) === '';
  put(path, lacksLabel && made.action === 'keep' ? before.get(path) : made);  // what has no label cannot be kept
}
function undo() {
  if (!history.length) return;
  const [path, row] = history.pop();
  put(path, row);
  const i = cards.indexOf(cardsOf.get(path)?.[0]);
  if (i >= 0) go(i);
}
const relabelled = label => label ? {new_label: label, action: 'keep'} : {new_label: ''};
document.querySelectorAll('select.action').forEach(s => s.addEventListener('change', () => change(pathOf(s), s.value === 'drop' ? {action: 'drop', new_label: ''} : {action: 'keep'})));
document.querySelectorAll('select.label').forEach(s => s.addEventListener('change', () => change(pathOf(s), relabelled(s.value ? JSON.parse(s.value) : ''))));
document.getElementById('undo').addEventListener('click', undo);

// keys: a class, keep, drop, undo, and the arrows; the others are the browser's
const KEYS = [...'1234567890abcefghijlmnopqrstvwxyz'];
let current = document.getElementById('next') ? 0 : -1;
function go(i) {
  cards[current]?.classList.remove('current');
  current = Math.max(0, Math.min(i, cards.length - 1));
  cards[current].classList.add('current');
  cards[current].focus({preventScroll: true});
  cards[current].scrollIntoView({block: 'center'});
}
if (current === 0) cards[0].classList.add('current');
function labelled(card, label) { return label === JSON.parse(card.dataset.label) ? {new_label: '', action: 'keep'} : relabelled(label); }
document.addEventListener('keydown', e => {
  if (e.target.closest('select, input, textarea, dialog') || e.altKey || !cards.length) return;
  if (e.ctrlKey || e.metaKey) { if (e.key === 'z') { e.preventDefault(); undo(); } return; }
  const label = labels[KEYS.indexOf(e.key)], card = cards[current];
  const fields = {k: {action: 'keep'}, d: {action: 'drop', new_label: ''}}[e.key] ?? (label === undefined || !card ? null : labelled(card, label));
  if (e.key === 'u') undo();
  else if (e.key === 'ArrowRight' || e.key === 'ArrowLeft') go(current + (e.key === 'ArrowRight' ? 1 : -1));
  else if (fields && card) { change(pathOf(card), fields); go(current + 1); }
  else return;
  e.preventDefault();
});
cards.forEach((card, i) => card.addEventListener('click', e => { if (!e.target.closest('select, button')) go(i); }));
if (cards.length) {
  const shown = [...labels.slice(0, KEYS.length).map((c, i) => [KEYS[i], c]), ['k', 'keep'], ['d', 'drop'], ['u', 'undo'], ['←', 'back'], ['→', 'next']];
  for (const [key, words] of shown) {
    const k = document.createElement('kbd');
    k.textContent = key;
    document.querySelector('.keys').append(k, ` ${words}  `);
  }
}
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
