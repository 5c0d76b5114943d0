// Shows a token's costs where titles cannot be seen: at once, and on touch screens.
for (const text of document.querySelectorAll(".tokens")) {
  const panel = text.nextElementSibling;
  for (const token of text.querySelectorAll("[title]")) {
    token.dataset.words = token.title;
    token.removeAttribute("title");
  }
  const show = (event) => {
    const words = event.target.dataset.words;
    if (words) panel.textContent = words;
  };
  text.addEventListener("pointerover", show);
  text.addEventListener("click", show);
}
