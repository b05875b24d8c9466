// mistakes: only those of a true and of a predicted class
for (const box of document.querySelectorAll('.filtered')) {
  const [truth, predicted] = box.querySelectorAll('select'), figures = [...box.querySelectorAll('figure')]
  box.querySelector('.filters').hidden = false
  box.addEventListener('input', () => {
    for (const f of figures) f.hidden = !!(truth.value && f.dataset.true !== truth.value || predicted.value && f.dataset.predicted !== predicted.value)
    box.querySelector('output').value = figures.filter(f => !f.hidden).length + ' shown'
  })
}
// two classes: the scores at any threshold, and with any smallest confidence; rows are counted in bins of the probability
const slider = document.getElementById('slider')
if (slider) {
  const { hits, misses } = JSON.parse(slider.dataset.counts), bins = hits.length, sum = list => list.reduce((a, b) => a + b, 0)
  const [threshold, confidence] = slider.querySelectorAll('input'), total = sum(hits) + sum(misses)
  const show = (name, text) => { slider.querySelector('output[name=' + name + ']').value = text }
  const percent = (part, whole) => whole ? (100 * part / whole).toFixed(1) + '%' : 'no rows'
  function measure() {
    const from = +threshold.value, least = +confidence.value
    let found = 0, wrong = 0, missed = 0, left = 0
    for (let i = 0; i < bins; i++) {
      if (i >= from) { if (i >= least) { found += hits[i]; wrong += misses[i] } }
      else if (i < bins - least) { missed += hits[i]; left += misses[i] }
    }
    const given = found + wrong + missed + left
    show('threshold', (from / bins).toFixed(3))
    show('confidence', least ? (least / bins).toFixed(3) : 'none')
    show('precision', percent(found, found + wrong))
    show('recall', percent(found, found + missed))
    show('accuracy', percent(found + left, given))
    show('withheld', percent(total - given, total))
    show('counts', `${found} found, ${missed} missed, ${wrong} called so wrongly, ${left} rightly not`)
    show('false', (from / bins).toFixed(3))
    show('missed', (1 - from / bins).toFixed(3))
  }
  slider.hidden = false
  slider.addEventListener('input', measure)
  measure()
}
