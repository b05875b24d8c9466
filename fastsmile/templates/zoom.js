// a click on a thumbnail opens it large
const large = document.createElement('dialog')
large.className = 'large'
large.setAttribute('aria-label', 'enlarged image')
document.body.append(large)
document.addEventListener('click', e => {
  const button = e.target.closest('button.zoom')
  if (!button) return
  const image = button.querySelector('img').cloneNode(), words = document.createElement('p'), close = document.createElement('button')
  image.removeAttribute('loading')
  words.textContent = image.alt
  close.textContent = 'Close'
  close.autofocus = true
  large.replaceChildren(image, words, close)
  large.showModal()
})
large.addEventListener('click', () => large.close())
