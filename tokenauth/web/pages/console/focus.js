// Keeps the focus on the page. A browser gives it to nothing when the element that has it is removed: the next Tab would
// then begin at the top, and a screen reader would say nothing.

let held = document.body; // what had the focus last
const hold = () => (held = document.activeElement ?? document.body);

/** From now on, give the focus to the heading when the element that has it is removed, such as the button of a row. */
export function keepFocus() {
  document.addEventListener("focusin", hold);
  document.addEventListener("click", hold); // a click may also take the focus from all elements
  new MutationObserver(() => held.isConnected || setTimeout(find)).observe(document.body, { childList: true, subtree: true });
}

/** Give the focus to the heading, unless something else has got it meanwhile. */
function find() {
  if (document.activeElement === document.body) document.querySelector("h1").focus({ preventScroll: true });
  hold();
}
