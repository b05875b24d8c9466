// The page of `fastsmile serve`: what is chosen, dropped, pasted or photographed is sent, and the server's answer is put into the page.
const $ = id => document.getElementById(id), form = $('ask'), most = +form.dataset.files, room = +form.dataset.bytes
const wait = s => new Promise(r => setTimeout(r, 1000 * s))
document.documentElement.classList.add('js')

// Groups of files, each small enough for one request; a file that alone is too large is not sent
function groups(files) {
  const out = [], large = []
  let bytes = Infinity
  for (const f of files) {
    if (f.size + 2048 > room) { large.push(f); continue }
    if (bytes + f.size + 1024 > room || out.at(-1).length === most) { out.push([]); bytes = 1024 }
    out.at(-1).push(f)
    bytes += f.size + 1024
  }
  return [out, large]
}

// A request that is told to come again does, five times
async function send(url, body, headers = {}) {
  for (let i = 0; ; i++) {
    const r = await fetch(url, { method: 'POST', body, headers })
    if (!r.headers.has('retry-after') || i === 5) return r
    await wait(+r.headers.get('retry-after') * (1 + Math.random()))
  }
}

function note(head, more) {
  const a = document.createElement('article'), h = document.createElement('h2'), p = document.createElement('p'), words = document.createElement('div')
  a.className = 'answer bad'; words.className = 'words'; h.textContent = head; p.textContent = more
  a.setAttribute('aria-label', head)
  words.append(h, p); a.append(words)
  $('answers').prepend(a)
  return a
}

function figure(article, kind, src, alt, words) {
  const f = article.querySelector('figure.' + kind) ?? document.createElement('figure'), img = new Image(), c = document.createElement('figcaption')
  f.className = kind; img.src = src; img.alt = alt; c.textContent = words
  f.replaceChildren(img, c)
  article.querySelector('.pictures').append(f)
  return img
}

const sent = new Map()  // article -> its file, for explanations

async function explain(article) {
  const method = $('method')?.value ?? 'none', file = sent.get(article), label = article.dataset.label
  if (method === 'none' || !file) { article.querySelector('figure.why')?.remove(); return }
  const query = new URLSearchParams({ method, label, face: article.dataset.face })
  const r = await send('/explain?' + query, file, { 'content-type': 'application/octet-stream' }).catch(() => null)
  if (!r?.ok || $('method').value !== method) return
  const img = figure(article, 'why', URL.createObjectURL(await r.blob()), `Where the evidence for ${label} lies in this picture`, `Orange: the evidence for ${label}`)
  await img.decode()
  const whole = article.querySelector('figure.sent img')
  await whole.decode().catch(() => 0)
  if (+form.dataset.squash && whole.naturalWidth) img.style.aspectRatio = whole.naturalWidth / whole.naturalHeight
}

let turn = Promise.resolve()
function ask(files) {
  const pictures = [...files]
  if (pictures.length) turn = turn.then(() => answer(pictures)).catch(e => { $('status').textContent = 'Something went wrong: ' + e.message })
}

async function answer(files) {
  const [parts, large] = groups(files), said = []
  for (const f of large) { note('This file is too large', `${f.name} has ${(f.size / 2 ** 20).toFixed(1)} MB; a request may have ${(room / 2 ** 20).toFixed(1)}.`); said.push(`${f.name}: too large`) }
  for (const part of parts) {
    $('status').textContent = part.length === 1 ? `Looking at ${part[0].name} ...` : `Looking at ${part.length} pictures ...`
    $('answers').setAttribute('aria-busy', 'true')
    const data = new FormData()
    for (const f of part) data.append('files', f, f.name)
    const r = await send('/', data, { 'HX-Request': 'true' }).catch(() => null)
    $('answers').removeAttribute('aria-busy')
    if (!r) { note('The server does not answer', 'Is it still running? Try again.'); said.push('the server does not answer'); continue }
    const box = document.createElement('template')
    box.innerHTML = await r.text()
    const articles = [...box.content.querySelectorAll('article')]
    $('answers').prepend(...articles)
    for (const a of articles) {
      said.push(a.getAttribute('aria-label'))
      const file = part[a.dataset.number]
      if (!file || a.dataset.ok !== '1') continue
      sent.set(a, file)
      figure(a, 'sent', URL.createObjectURL(file), `${file.name}, as it was sent`, 'The picture')
    }
    $('status').textContent = said.length > 3 ? `${said.length} answers. The first: ${said[0]}` : said.join('. ')
    for (const a of articles) if (sent.has(a)) await explain(a)
  }
  $('status').textContent = said.length > 3 ? `${said.length} answers. The first: ${said[0]}` : said.join('. ')
}

form.addEventListener('submit', e => { e.preventDefault(); ask($('files').files) })
for (const id of ['files', 'shot']) $(id).addEventListener('change', e => { ask(e.target.files); e.target.value = '' })
$('method')?.addEventListener('change', async () => { for (const a of sent.keys()) await explain(a) })
for (const t of ['dragenter', 'dragover']) document.addEventListener(t, e => { e.preventDefault(); document.documentElement.classList.add('over') })
for (const t of ['dragleave', 'drop']) document.addEventListener(t, e => { e.preventDefault(); document.documentElement.classList.remove('over') })
document.addEventListener('drop', e => ask(e.dataTransfer.files))
document.addEventListener('paste', e => ask(e.clipboardData.files))

// The camera, where the browser gives one to a page: from this machine, or over https
let film
function shut() { halt(); film?.getTracks().forEach(t => t.stop()); film = null; $('booth').close() }
if (navigator.mediaDevices?.getUserMedia) $('camera').hidden = false
$('camera').addEventListener('click', async () => {
  try { film = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'user' } }) }
  catch (e) { $('status').textContent = 'The camera cannot be used: ' + e.message; return }
  $('film').srcObject = film
  $('booth').showModal()
})
$('close').addEventListener('click', shut)
$('booth').addEventListener('cancel', shut)
function still(most, quality) {  // a JPEG of what the camera sees, at most so many pixels wide and high
  const c = document.createElement('canvas'), v = $('film'), scale = Math.min(1, most / Math.max(v.videoWidth, v.videoHeight))
  if (!v.videoWidth) return null
  c.width = Math.round(v.videoWidth * scale); c.height = Math.round(v.videoHeight * scale)
  c.getContext('2d').drawImage(v, 0, 0, c.width, c.height)
  return new Promise(done => c.toBlob(done, 'image/jpeg', quality))
}
$('take').addEventListener('click', async () => {
  const picture = await still(Infinity, .92)
  if (!picture) return
  ask([new File([picture], `camera ${new Date().toLocaleTimeString()}.jpg`, { type: 'image/jpeg' })])
  shut()
})

// Live: a frame every second, the next one not before the answer to the last; the button, Close and a hidden tab end it
let live = 0, watching = false
function halt() { live++; watching = false; $('live').textContent = 'Label live'; $('now').hidden = true }
function showNow(rows, problem) {
  const row = rows?.[0], share = row?.confidence || 0
  const unlike = row?.unlike >= .95 ? ', unlike the training images' : '', others = rows?.length > 1 ? `, the largest of ${rows.length} faces` : ''
  const error = problem || row.error
  const words = error ? error[0].toUpperCase() + error.slice(1) : `${row.label || `Not sure: ${row.withheld}`} ${Math.round(100 * share)}%${unlike}${others}`
  if ($('now-label').textContent !== words) $('now-label').textContent = words
  $('now-bar').value = error ? 0 : share
  $('now').hidden = false
}
async function watch() {
  const turn = ++live
  watching = true
  $('live').textContent = 'Stop'
  while (turn === live) {
    const start = performance.now(), frame = await still(640, .85)
    if (turn !== live) return
    const answer = frame && await send('/predict', frame, { 'content-type': 'image/jpeg' }).catch(() => null)
    const body = answer && await answer.json().catch(() => null)
    if (turn !== live) return
    if (frame) showNow(body?.predictions, body?.predictions ? '' : body?.error ?? 'The server does not answer')
    await wait(Math.max(.05, 1 - (performance.now() - start) / 1000))
  }
}
$('live').addEventListener('click', () => watching ? halt() : watch())
document.addEventListener('visibilitychange', () => { if (document.hidden) halt() })
