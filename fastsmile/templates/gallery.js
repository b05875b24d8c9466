const $ = id => document.getElementById(id)
const orders = { down: (a, b) => b.dataset.confidence - a.dataset.confidence, up: (a, b) => a.dataset.confidence - b.dataset.confidence,
                 name: (a, b) => a.dataset.name < b.dataset.name ? -1 : a.dataset.name > b.dataset.name ? 1 : 0 }
function filter() {
  const on = new Set([...document.querySelectorAll('.class:checked')].map(c => c.value)), text = $('name').value.toLowerCase()
  const low = $('low').value === '' ? 0 : +$('low').value, high = $('high').value === '' ? 1 : +$('high').value
  const mark = $('mark') ? $('mark').value : ''
  let n = 0
  for (const section of document.querySelectorAll('section')) {
    let here = 0
    for (const f of section.querySelectorAll('figure')) {
      const c = +f.dataset.confidence
      f.hidden = !(on.has(section.dataset.class) && c >= low && c <= high && f.dataset.name.toLowerCase().includes(text)
        && f.dataset.marks.split(' ').includes(mark))
      here += !f.hidden
    }
    section.hidden = !here
    n += here
  }
  $('count').value = n + ' shown'
}
function sort() { for (const grid of document.querySelectorAll('.grid')) grid.append(...[...grid.children].sort(orders[$('sort').value])) }
document.querySelector('form').addEventListener('input', e => e.target.id === 'sort' ? sort() : filter())
document.querySelector('form').addEventListener('submit', e => e.preventDefault())
