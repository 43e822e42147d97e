// Log in: at the login page, with a password, or with a token.

import { call, logIn, useToken, whoAmI } from "./api.js";
import { Problem } from "./parts.js";
import { html, useEffect, useRef, useState } from "./preact.js";

/** `entered` gets who is logged in. `note` says why the person is here. */
export function LogIn({ entered, note }) {
  const [page, setPage] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const heading = useRef(null);
  useEffect(() => {
    if (note) heading.current.focus();
    call("GET", "./")
      .then((found) => setPage(loginPage(found.login)))
      .catch(() => {});
  }, []);

  const enter = async (event, begin) => {
    event.preventDefault();
    if (busy) return;
    const fields = event.target.elements;
    setBusy(true);
    setError(null);
    try {
      await begin(fields);
      const me = await whoAmI();
      if (me) entered(me);
      else setError("This token is not valid: it is unknown, expired or revoked.");
    } catch (failure) {
      setError(failure);
      fields.password?.select();
    }
    setBusy(false);
  };
  const withPassword = (event) => enter(event, (fields) => logIn(fields.username.value, fields.password.value));
  const withToken = (event) =>
    enter(event, (fields) => {
      const value = fields.token.value.trim();
      useToken(/^[\x21-\x7e]+$/.test(value) ? value : "-"); // what is no token may not fit into a header
    });

  return html`<main class="narrow">
    <h1 tabindex="-1" ref=${heading}>Log in</h1>
    <p class="soft">to the console of tokenauth</p>
    ${note && html`<p class="note" role="status">${note}</p>`}
    ${error && (typeof error === "string" ? html`<p class="error" role="alert">${error}</p>` : html`<${Problem} error=${error} />`)}
    ${page && html`<p><a class="button" href=${page}>Log in with the login page</a></p>`}
    <form onSubmit=${withPassword}>
      <label for="username">User name</label>
      <input id="username" name="username" required maxlength="256" autocomplete="username" autocapitalize="none" spellcheck=${false} />
      <label for="password">Password</label>
      <input id="password" name="password" type="password" required maxlength="1024" autocomplete="current-password" />
      <button class=${page ? "button plain" : "button"} aria-disabled=${busy}>Log in${page ? " for this tab only" : ""}</button>
    </form>
    <details>
      <summary>Use a token instead</summary>
      <form onSubmit=${withToken}>
        <label for="token">Token</label>
        <input id="token" name="token" type="password" required autocomplete="off" />
        <button class="button plain" aria-disabled=${busy}>Use this token</button>
      </form>
    </details>
    <p class="soft small">
      ${page ? "Without the login page, this" : "This"} login is kept in this page only. Closing or reloading the page forgets it. To end it, log out.
    </p>
  </main>`;
}

/** Return the login page with the way back to here, if its cookie is sent to here. */
function loginPage(address) {
  if (!address || new URL(address).origin !== location.origin) return null;
  return `${address}?rd=${encodeURIComponent(location.href)}`;
}
