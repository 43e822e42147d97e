// The console: who is logged in, which view is shown, and whether the service answers.

import { hasToken, logOut, now, onChange, whoAmI } from "./api.js";
import { keepFocus } from "./focus.js";
import { readAll, start, stop, subscribe } from "./live.js";
import { LogIn } from "./login.js";
import { Mine } from "./mine.js";
import { Dialogs, Problem, Time } from "./parts.js";
import { Health } from "./health.js";
import { Pool, Pools } from "./pools.js";
import { Throttle } from "./throttle.js";
import { Tokens } from "./tokens.js";
import { checkVersion, useOutdated } from "./version.js";
import { html, render, useEffect, useErrorBoundary, useRef, useState } from "./preact.js";

/** Views by the part of the address after "#": title, component, and the scope that it needs. */
const VIEWS = {
  mine: ["Mine", Mine],
  pools: ["Pools", Pools],
  tokens: ["Tokens", Tokens, "admin"],
  throttle: ["Throttle", Throttle, "admin"],
  health: ["Health", Health, "admin"],
};

function useRoute() {
  const read = () => location.hash.slice(1).split("/").map(decode);
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const changed = () => setRoute(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function App() {
  const [me, setMe] = useState(undefined); // undefined: not known yet; null: nobody
  const [note, setNote] = useState("");
  const [error, setError] = useState(null);
  const begin = async () => {
    setError(null);
    try {
      setMe(await whoAmI());
    } catch (failure) {
      setError(failure);
    }
  };
  useEffect(() => void begin(), []);
  useEffect(
    () =>
      onChange((event) => {
        if (event !== "ended") return;
        stop();
        setMe((before) => {
          if (before) setNote("Your login has ended. Log in again to go on where you were.");
          return null;
        });
      }),
    [],
  );
  useEffect(() => {
    if (!error) return undefined;
    const timer = setInterval(begin, 5000);
    return () => clearInterval(timer);
  }, [error]);
  useEffect(() => {
    if (!me) return undefined;
    const look = async () => {
      const found = await whoAmI().catch(() => null);
      if (found && (found.id !== me.id || found.scopes.join() !== me.scopes.join())) setMe(found);
    };
    const unsubscribe = subscribe(["hello"], look);
    start();
    return () => {
      unsubscribe();
      stop();
    };
  }, [me]);
  const entered = (found) => {
    setNote("");
    setMe(found);
  };
  const leave = async () => {
    if (!hasToken()) {
      location.assign(`logout?rd=${encodeURIComponent(location.href.split("#")[0])}`);
      return;
    }
    setNote("Logging out…");
    setMe(null);
    try {
      await logOut();
      setNote("You are logged out.");
    } catch {
      setNote("tokenauth did not answer, so your login goes on until it expires. End it when tokenauth is back.");
    }
  };
  if (error) {
    return html`<${Banner} /><main class="narrow"><h1 tabindex="-1">Console</h1><${Problem} error=${error} retry=${begin} /></main>`;
  }
  if (me === undefined) return html`<main class="narrow"><h1 tabindex="-1">Console</h1><p class="soft loading" role="status">Loading…</p></main>`;
  if (me === null) return html`<${LogIn} entered=${entered} note=${note} />`;
  // Another tab may have replaced the login of the cookie: its user must get nothing that was meant for this one.
  return html`<${Shell} key=${me.id} me=${me} logOut=${leave} />`;
}

/** A view. If it fails, the others go on. */
function Guarded({ children }) {
  const [failure, restart] = useErrorBoundary();
  if (failure) return html`<${Problem} error=${failure} retry=${restart} />`;
  return children;
}

function Shell({ me, logOut }) {
  const [name, detail] = useRoute();
  const shown = Object.entries(VIEWS).filter(([, [, , scope]]) => !scope || me.scopes.includes(scope));
  const known = shown.some(([view]) => view === name) ? name : name ? null : "mine";
  const [title, View] = VIEWS[known] ?? ["Not found", NotFound];
  const inPool = known === "pools" && detail;
  const heading = useRef(null);
  const place = `${known} ${detail ?? ""}`;
  const first = useRef(place);
  useEffect(() => {
    document.title = `${inPool ? detail : title} · tokenauth`;
    if (first.current !== place) heading.current.focus();
    first.current = null;
  }, [place]);
  return html`
    <header class="top">
      <a class="skip" href="#" onClick=${(event) => (event.preventDefault(), heading.current.focus())}>To the content</a>
      <p class="brand">tokenauth</p>
      <nav aria-label="Views">
        ${shown.map(
          ([view, [text]]) => html`<a key=${view} href=${`#${view}`} aria-current=${view === known ? "page" : undefined}>${text}</a>`,
        )}
      </nav>
      <p class="who"><span class="name">${me.username}</span> <button class="small" onClick=${logOut}>Log out</button></p>
    </header>
    <${Banner} />
    <main>
      <h1 tabindex="-1" ref=${heading}>${inPool ? detail : title}</h1>
      <${Guarded} key=${place}>
        ${inPool ? html`<${Pool} name=${detail} me=${me} />` : html`<${View} me=${me} logOut=${logOut} />`}
      <//>
    </main>
    <${Dialogs} />
  `;
}

function NotFound() {
  return html`<p>There is no such view, or you lack the scope for it. <a href="#mine">Back to mine</a></p>`;
}

/** Says that the service does not answer, or that this page is of another version than the service. */
function Banner() {
  const [since, setSince] = useState(null);
  const old = useOutdated();
  useEffect(
    () =>
      onChange((event) => {
        if (event === "offline") setSince((before) => before ?? now());
        if (event === "online") {
          setSince(null);
          checkVersion();
        }
      }),
    [],
  );
  useEffect(() => subscribe(["reconnected"], checkVersion, { always: false }), []);
  return html`<div role="status" class="banners">
    ${since !== null &&
    html`<p class="error banner">
      <strong>tokenauth does not answer.</strong> This page tries again every few seconds. What it shows is from
      ${" "}<${Time} at=${since} />.
      <button class="small" onClick=${readAll}>Try now</button>
    </p>`}
    ${since === null &&
    old &&
    html`<p class="note banner">tokenauth has been upgraded. <button class="small" onClick=${() => location.reload()}>Reload this page</button></p>`}
  </div>`;
}

const root = document.getElementById("console");
root.replaceChildren();
keepFocus();
render(html`<${App} />`, root);
