// Parts that several views use.

import { Offline, Refused, now } from "./api.js";
import { checkVersion, useOutdated } from "./version.js";
import { exact, fromNow, timeOfDay } from "./words.js";
import { html, useEffect, useRef, useState } from "./preact.js";

// Times

let times = 0;
const tickers = { 1: new Set(), 15: new Set() };
for (const [seconds, ticked] of Object.entries(tickers)) {
  setInterval(() => document.hidden || ticked.forEach((tick) => tick()), seconds * 1000);
}

/** An instant, as its distance from now. On hover and focus it shows the instant itself. */
export function Time({ at, never = "never" }) {
  const [, tick] = useState(0);
  const [id] = useState(() => `time-${(times += 1)}`);
  const pace = at && Math.abs(at - now()) < 100 ? 1 : 15;
  useEffect(() => {
    const ticked = () => tick((count) => count + 1);
    tickers[pace].add(ticked);
    return () => tickers[pace].delete(ticked);
  }, [pace]);
  if (at === null || at === undefined) return html`<span class="soft">${never}</span>`;
  return html`<span class="time" tabindex="0" aria-describedby=${id}
    ><time datetime=${new Date(at * 1000).toISOString()}>${fromNow(at, now())}</time
    ><span class="exact" role="tooltip" id=${id}>${exact(at)}</span></span
  >`;
}

// States

/**
 * Say why something could not be read (then `retry` reads it again) or done, and what to do. If the page is too old for
 * the service, the banner says it.
 */
export function Problem({ error, retry }) {
  const failed = !(error instanceof Refused || error instanceof Offline);
  const outdated = useOutdated();
  useEffect(() => void (failed && checkVersion()), [failed]);
  if (failed && outdated) return null;
  const text =
    error instanceof Refused
      ? error.message
      : !(error instanceof Offline)
        ? "This page has failed. Try again, or reload it."
        : retry
          ? "tokenauth does not answer. Is it running? This page tries again by itself."
          : "tokenauth did not answer. It may have done what you asked for: look before you try again.";
  return html`<div class="error" role="alert">
    <p>${text}</p>
    ${retry && html`<button class="small" onClick=${retry}>Try again</button>`}
  </div>`;
}

/** Show what `read` has (a result of useData) with `children`, a function; or that it is loading, or has failed. */
export function Loaded({ read, children }) {
  if (read.data === undefined) {
    if (read.error) return html`<${Problem} error=${read.error} retry=${read.reload} />`;
    return html`<p class="soft loading" role="status">Loading…</p>`;
  }
  if (read.error instanceof Refused && [403, 404].includes(read.error.status)) return html`<${Problem} error=${read.error} />`;
  const said = read.error && !(read.error instanceof Offline); // else a banner says it
  return html`
    ${said && html`<${Problem} error=${read.error} retry=${read.reload} />`}
    <div class=${read.error ? "old" : undefined}>
      ${read.error && html`<p><strong>As of ${timeOfDay(read.at)}</strong></p>`}
      ${children(read.data)}
    </div>
  `;
}

// Tables

/**
 * A table, which on narrow screens is a list of cards. `columns` are [title, function of a row, class].
 * The roles keep it a table for screen readers where it is not shown as one.
 */
export function Table({ label, columns, rows, keyOf, empty, rowClass = () => "" }) {
  if (!rows.length) return html`<p class="soft empty">${empty}</p>`;
  return html`<div class="table" role="table" aria-label=${label}>
    <div class="row head" role="row">
      ${columns.map(([title, , style]) => html`<span role="columnheader" class=${style ?? ""} key=${title}>${title}</span>`)}
    </div>
    ${rows.map(
      (row) => html`<div class=${`row ${rowClass(row)}`} role="row" key=${keyOf(row)}>
        ${columns.map(
          ([title, show, style]) => html`<div role="cell" class=${style ?? ""} data-title=${title} key=${title}>
            <div class="value">${show(row)}</div>
          </div>`,
        )}
      </div>`,
    )}
  </div>`;
}

/** The buttons of a row. `actions` are [text, function, description for screen readers], or false for none. */
export function Actions({ actions }) {
  return html`<div class="actions">
    ${actions
      .filter(Boolean)
      .map(
        ([text, act, description]) =>
          html`<button class="small" key=${text} aria-label=${description} onClick=${act}>${text}</button>`,
      )}
  </div>`;
}

// Dialogs and messages

let dialogs = 0;
let openDialog = () => {};
let showMessage = () => {};

/** Show a message for a while, and have screen readers say it: a text, or HTML, such as with a link. */
export function say(message) {
  showMessage(message);
}

/**
 * Open a dialog. `content` is shown below `text`. `fields` are [{name, label, kind?, value?, help?, required?,
 * options?}]. `run` gets their values: if it throws, the dialog says why; if it returns something, the dialog shows that.
 */
export function ask({ title, text, content, fields = [], action, danger = false, run }) {
  openDialog({ key: (dialogs += 1), title, text, content, fields, action, danger, run });
}

export function Dialogs() {
  const [spec, setSpec] = useState(null);
  const [message, setMessage] = useState("");
  openDialog = setSpec;
  showMessage = setMessage;
  useEffect(() => {
    if (!message) return undefined;
    const timer = setTimeout(() => setMessage(""), typeof message === "string" ? 6000 : 30_000); // a link is to be reached
    return () => clearTimeout(timer);
  }, [message]);
  return html`
    ${spec && html`<${Dialog} ...${spec} close=${() => setSpec((shown) => (shown === spec ? null : shown))} />`}
    <div class="message" role="status">${message && html`<p>${message}</p>`}</div>
  `;
}

function Dialog({ title, text, content, fields, action, danger, run, close }) {
  const element = useRef(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [result, setResult] = useState(null);
  useEffect(() => {
    const before = document.activeElement;
    element.current.showModal();
    if (danger) element.current.querySelector("[type=button]").focus(); // not in a field, where Enter would go on
    return () => void setTimeout(() => before?.focus()); // after it, the page is open again
  }, []);
  const submit = async (event) => {
    event.preventDefault();
    if (busy) return;
    const values = Object.fromEntries(
      fields.map(({ name, kind }) => {
        const found = [...event.target.elements].filter((each) => each.name === name);
        return [name, kind === "choices" ? found.filter((each) => each.checked).map((each) => each.value) : found[0].value];
      }),
    );
    setBusy(true);
    setError(null);
    try {
      const shown = await run(values);
      if (shown) setResult(shown);
      else close();
    } catch (failure) {
      setError(failure);
    }
    setBusy(false);
  };
  useEffect(() => void (result && element.current.querySelector("input, button").focus()), [result]);
  const cancel = () => busy || close();
  // What is shown only once, or will be, is not lost by Escape, also not by two of them, which no page can prevent.
  const closed = () => (busy || result ? element.current.showModal() : close());
  return html`<dialog ref=${element} aria-labelledby="dialog-title" aria-describedby=${text && "dialog-text"} onClose=${closed}>
    <h2 id="dialog-title">${title}</h2>
    ${result
      ? html`${result}<div class="buttons"><button class="main" onClick=${close}>Done</button></div>`
      : html`<form onSubmit=${submit}>
          ${text && html`<p id="dialog-text">${text}</p>`}
          ${content}
          ${fields.map((field) => html`<${Field} key=${field.name} ...${field} />`)}
          ${error && html`<${Problem} error=${error} />`}
          <div class="buttons">
            <button type="button" aria-disabled=${busy} onClick=${cancel}>Cancel</button>
            <button class=${danger ? "main danger" : "main"} aria-disabled=${busy}>${action}</button>
          </div>
        </form>`}
  </dialog>`;
}

function Field({ name, label, kind = "text", value = "", help, required = false, options, maxLength }) {
  const id = `field-${name}`;
  const described = help ? `${id}-help` : undefined;
  const note = help && html`<p class="soft small" id=${described}>${help}</p>`;
  if (kind === "choices") {
    return html`<fieldset aria-describedby=${described}>
      <legend>${label}</legend>
      ${note}
      ${options.map(
        ([choice, text, checked]) =>
          html`<label class="check" key=${choice}
            ><input type="checkbox" name=${name} value=${choice} defaultChecked=${checked} />${text}</label
          >`,
      )}
    </fieldset>`;
  }
  return html`<div>
    <label for=${id}>${label}</label>
    ${kind === "select"
      ? html`<select id=${id} name=${name} aria-describedby=${described}>
          ${options.map(
            ([choice, text]) => html`<option key=${choice} value=${choice} selected=${choice === value}>${text}</option>`,
          )}
        </select>`
      : kind === "textarea"
      ? html`<textarea id=${id} name=${name} rows="6" required=${required} spellcheck=${false} aria-describedby=${described}></textarea>`
      : html`<input
          id=${id}
          name=${name}
          type=${kind}
          defaultValue=${value}
          required=${required}
          maxlength=${maxLength}
          autocomplete="off"
          spellcheck=${false}
          aria-describedby=${described}
        />`}
    ${note}
  </div>`;
}

/** A value that is shown only once, with a button that copies it. */
export function Secret({ value, label }) {
  const field = useRef(null);
  const [copied, setCopied] = useState("");
  const copy = async () => {
    field.current.select();
    try {
      // Only pages of https and of this machine have a clipboard.
      await navigator.clipboard.writeText(value);
      setCopied("Copied.");
    } catch {
      setCopied(document.execCommand("copy") ? "Copied." : "Copy it with Ctrl-C.");
    }
  };
  return html`<div class="secret">
    <label for="secret">${label}</label>
    <div class="together">
      <input id="secret" ref=${field} readonly value=${value} onFocus=${() => field.current.select()} />
      <button onClick=${copy}>Copy</button>
    </div>
    <p class="soft small" role="status">${copied || "It is shown only now. tokenauth keeps no copy of it."}</p>
  </div>`;
}

/** How much of something is used. */
export function Meter({ used, of, label }) {
  if (!of) return null;
  return html`<meter min="0" max=${of} value=${used} aria-label=${label}></meter>`;
}
