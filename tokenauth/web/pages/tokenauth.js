/**
 * Log in to a tokenauth server from a web page, and send the token with requests:
 *
 *     import { TokenAuth } from "https://auth.example.com/tokenauth.js";
 *
 *     const auth = new TokenAuth({ origins: ["https://api.example.com"] });
 *     auth.addEventListener("logout", (event) => showLogin(event.detail.reason));
 *     await auth.login("ann", "password");
 *     const response = await auth.fetch("https://api.example.com/reports");
 *
 * The token is kept in memory or in sessionStorage. It is never in a URL, a cookie, localStorage or the console.
 * tokenauth.d.ts, beside this file, describes what is exported.
 */

/**
 * @typedef {import("./tokenauth.js").TokenAuthOptions} TokenAuthOptions
 * @typedef {import("./tokenauth.js").TokenAuthErrorCode} TokenAuthErrorCode
 * @typedef {import("./tokenauth.js").LogoutReason} LogoutReason
 * @typedef {{ token: string, username: string, expiresAt: number, lifetime: number, renewable: boolean,
 *   renewAfter: number, asking?: Promise<void> }} Login Times are in milliseconds, of this computer's clock.
 * @typedef {{ username: string, password: string, cancelled: AbortController, done: Promise<void> }} Pending
 * @typedef {{ status: number, text: string, retryAfter: number | undefined }} Answer
 */

/** Look at the clock this often: one long timer would be late after the computer has slept. */
const RECHECK = 30_000;

/** How long a question about the token and its revocation may take, and how long to wait after one that failed. */
const TIMEOUT = 10_000;

/** How long a login may take: it may have to wait at the server. */
const LOGIN_TIMEOUT = 30_000;

/** The latest time that a Date can have, in seconds. */
const LATEST = 8.64e12;

export class TokenAuthError extends Error {
  /**
   * @param {TokenAuthErrorCode} code
   * @param {string} message
   * @param {{ status?: number, retryAfter?: number, cause?: unknown }} details
   */
  constructor(code, message, { status, retryAfter, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "TokenAuthError";
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export class TokenAuth extends EventTarget {
  /** @type {URL} */ #url;
  /** @type {Set<string>} */ #origins;
  /** @type {"X-Token" | "Authorization"} */ #header;
  /** @type {string} */ #key;
  /** @type {Storage | undefined} */ #storage;
  /** @type {BroadcastChannel} */ #channel;
  /** @type {Login | undefined} */ #login;
  /** @type {Pending | undefined} */ #pending;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;
  /** @type {Set<string>} No longer used here, but perhaps valid. */ #unrevoked = new Set();
  #closing = new AbortController();

  /** @param {TokenAuthOptions} options */
  constructor({ url, origins = [], storage = "memory", header = "X-Token" } = {}) {
    super();
    this.#url = parseServer(url);
    this.#origins = new Set([this.#url.origin, ...origins.map(checkOrigin)]);
    this.#header = oneOf("header", header, ["X-Token", "Authorization"]);
    this.#key = `tokenauth ${this.#url}`;
    this.#storage = oneOf("storage", storage, ["memory", "session"]) === "session" ? findSessionStorage() : undefined;
    this.#login = this.#restore();
    this.fetch = this.fetch.bind(this);

    this.#channel = new BroadcastChannel(this.#key);
    this.#channel.addEventListener("message", ({ data }) => this.#followLogout(data.username));
    const { signal } = this.#closing;
    document.addEventListener("visibilitychange", () => this.#look(), { signal });
    // A page that the Back button brings back has slept, and has missed what other tabs said.
    addEventListener("pageshow", ({ persisted }) => persisted && this.#login && this.#ask(this.#login), { signal });
    this.#look();
  }

  get loggedIn() {
    return this.#login !== undefined;
  }

  get username() {
    return this.#login?.username ?? null;
  }

  get expiresAt() {
    return this.#login ? new Date(this.#login.expiresAt) : null;
  }

  /**
   * @param {string} username
   * @param {string} password
   * @param {{ signal?: AbortSignal }} options
   */
  async login(username, password, { signal } = {}) {
    signal?.throwIfAborted();
    if (!this.#pending) {
      /** @type {Pending} */
      const pending = { username, password, cancelled: new AbortController(), done: Promise.resolve() };
      const cancel = () => this.#cancel(pending, signal?.reason);
      signal?.addEventListener("abort", cancel);
      this.#pending = pending;
      pending.done = unlessAborted(pending.cancelled.signal, this.#logIn(pending)).finally(() => {
        signal?.removeEventListener("abort", cancel);
        if (this.#pending === pending) this.#pending = undefined;
      });
      return pending.done;
    }
    if (this.#pending.username !== username || this.#pending.password !== password) {
      throw new TokenAuthError("login_pending", "Another login has not finished yet. Wait for it.");
    }
    return signal ? unlessAborted(signal, this.#pending.done) : this.#pending.done;
  }

  async logout() {
    for (const found of [this.#pending, this.#login]) {
      if (found && !this.#closing.signal.aborted) this.#channel.postMessage({ username: found.username });
    }
    this.#cancel(this.#pending);
    if (this.#login) this.#end("logout");
    await this.#revoke();
  }

  /**
   * @param {RequestInfo | URL} input
   * @param {RequestInit} [init]
   */
  async fetch(input, init) {
    const request = new Request(input, init);
    const { origin, pathname } = new URL(request.url);
    if (!this.#origins.has(origin)) {
      const hint = "Add it to `origins` if it may have the token. Otherwise use the global fetch().";
      throw new TokenAuthError("origin_not_listed", `The token is not sent to ${origin}. ${hint}`);
    }
    if (request.mode === "no-cors") {
      throw new TokenAuthError("invalid_request", 'A request with the mode "no-cors" cannot carry a token.');
    }
    const login = this.#login;
    if (login && login.expiresAt <= Date.now()) await unlessAborted(request.signal, this.#ask(login));
    if (!login || login !== this.#login) throw new TokenAuthError("logged_out", "There is no login. Log in first.");
    // Nobody waits for the renewal: the token is valid, and keeps its value.
    if (login.renewable && login.expiresAt - Date.now() < login.lifetime / 4 && Date.now() >= login.renewAfter) {
      this.#ask(login, true);
    }

    request.headers.set(this.#header, this.#header === "X-Token" ? login.token : `Bearer ${login.token}`);
    const { referrer, referrerPolicy } = request; // a changed copy loses them
    const response = await fetch(new Request(request, { redirect: "manual", referrer, referrerPolicy }));
    if (response.type === "opaqueredirect") {
      const hint = "The token must not follow it to another place: use the final address.";
      throw new TokenAuthError("redirected", `${origin}${pathname} answered with a redirect. ${hint}`);
    }
    // An API may have its own reasons for a 401: the login is over only if the token's server says so.
    if (response.status === 401 && login === this.#login) await unlessAborted(request.signal, this.#ask(login));
    return response;
  }

  close() {
    this.#closing.abort();
    this.#channel.close();
    clearTimeout(this.#timer);
  }

  /** @param {Pending} pending */
  async #logIn(pending) {
    const { username, password } = pending;
    const body = JSON.stringify({ username, password });
    const answer = await this.#call("POST", "api/token", { body }, LOGIN_TIMEOUT);
    if (answer.status === 401) {
      throw new TokenAuthError("invalid_credentials", "Wrong user name or password.", { status: 401 });
    }
    const { token, expiry_time } = this.#read(answer);
    if (!isToken(token) || !isTime(expiry_time)) throw this.#unexpected(answer);
    if (this.#pending !== pending) {
      this.#unrevoked.add(token); // it was cancelled
    } else {
      this.#pending = undefined;
      if (this.#login) this.#unrevoked.add(this.#login.token);
      const expiresAt = toLocalTime(expiry_time);
      this.#login = { token, username, expiresAt, lifetime: expiresAt - Date.now(), renewable: true, renewAfter: 0 };
      this.#save();
      this.#look();
      this.dispatchEvent(new Event("login"));
    }
    this.#revoke().catch(() => {}); // the replaced or cancelled token; logout() tries again
  }

  /**
   * Reject a login that has not finished. If its token arrives, it is revoked.
   * @param {Pending | undefined} pending
   * @param {unknown} reason
   */
  #cancel(pending, reason = new TokenAuthError("logged_out", "A logout came before the login had finished.")) {
    if (!pending || this.#pending !== pending) return;
    this.#pending = undefined;
    pending.cancelled.abort(reason);
  }

  /** @param {LogoutReason} reason */
  #end(reason) {
    if (this.#login && (reason === "logout" || reason === "other_tab")) this.#unrevoked.add(this.#login.token);
    this.#login = undefined;
    this.#save();
    clearTimeout(this.#timer);
    this.dispatchEvent(new CustomEvent("logout", { detail: { reason } }));
  }

  /** @param {string} username Who has logged out in another tab. */
  #followLogout(username) {
    if (this.#pending && isSameUser(this.#pending.username, username)) this.#cancel(this.#pending);
    if (!this.#login || !isSameUser(this.#login.username, username)) return;
    this.#end("other_tab");
    this.#revoke().catch(() => {});
  }

  async #revoke() {
    // All at once: one that fails or hangs must not keep the others valid.
    await Promise.all(Array.from(this.#unrevoked, (token) => this.#revokeOne(token)));
  }

  /** @param {string} token */
  async #revokeOne(token) {
    try {
      this.#read(await this.#call("DELETE", "api/token", { token, keepalive: true }));
    } catch (error) {
      if (!(error instanceof TokenAuthError)) throw error;
      const message = `This page has logged out, but the token is still valid: try again. ${error.message}`;
      throw new TokenAuthError(error.code, message, error);
    }
    this.#unrevoked.delete(token);
  }

  /** End the login if its time is over. Otherwise look again later. */
  #look() {
    clearTimeout(this.#timer);
    if (!this.#login || this.#closing.signal.aborted) return;
    const left = this.#login.expiresAt - Date.now();
    if (left <= 0) this.#ask(this.#login);
    else this.#timer = setTimeout(() => this.#look(), Math.min(left, RECHECK));
  }

  /**
   * Ask the server about the token, once for all callers of the same time. Never rejects.
   * @param {Login} login
   */
  #ask(login, renew = false) {
    login.asking ??= this.#update(login, renew).finally(() => (login.asking = undefined));
    return login.asking;
  }

  /** @param {Login} login @param {boolean} renew */
  async #update(login, renew) {
    const { valid, expiry_time, max_expiry_time } = await this.#validity(login, renew).catch(() => ({}));
    if (login !== this.#login) return; // it has ended or was replaced meanwhile
    const now = Date.now();
    if (valid && isTime(expiry_time)) {
      login.expiresAt = toLocalTime(expiry_time);
      if (renew && login.renewable) {
        login.lifetime = login.expiresAt - now;
        login.renewable = max_expiry_time > expiry_time;
      }
    } else if (valid === false || now >= login.expiresAt) {
      return this.#end(now >= login.expiresAt ? "expired" : "revoked");
    } else {
      login.renewAfter = now + TIMEOUT; // no answer that says anything
    }
    this.#save();
    this.#look();
  }

  /** @param {Login} login @param {boolean} renew */
  async #validity(login, renew) {
    const { token } = login;
    if (renew) {
      const answer = await this.#call("POST", "api/token/renew", { token });
      if (answer.status === 401) return { valid: false };
      if (answer.status !== 409) return this.#read(answer);
      login.renewable = false; // its lifetime is fixed
    }
    // touch=0: this is no use of the token, and does not lengthen a sliding lifetime.
    return this.#read(await this.#call("GET", "api/token?touch=0", { token }));
  }

  /**
   * Send a request to the server and read the whole answer, within `timeout`. Rejects with a TokenAuthError.
   * @param {string} method
   * @param {string} path
   * @param {{ token?: string, body?: string, keepalive?: boolean }} options
   * @returns {Promise<Answer>}
   */
  async #call(method, path, { token, ...init }, timeout = TIMEOUT) {
    const headers = new Headers(init.body === undefined ? {} : { "Content-Type": "application/json" });
    if (token !== undefined) headers.set("X-Token", token);
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), timeout);
    try {
      const url = new URL(path, this.#url);
      const { signal } = late;
      const response = await fetch(url, { method, headers, credentials: "omit", redirect: "error", signal, ...init });
      const wait = response.headers.get("Retry-After") ?? "";
      const retryAfter = /^\d{1,9}$/.test(wait) ? Number(wait) || undefined : undefined;
      return { status: response.status, text: await response.text(), retryAfter };
    } catch (cause) {
      const problem = late.signal.aborted
        ? `did not answer within ${timeout / 1000} seconds.`
        : `did not answer this page. If it is running, its cors_origins must list ${globalThis.origin}.`;
      throw new TokenAuthError("unreachable", `${this.#url} ${problem}`, { cause });
    } finally {
      clearTimeout(timer);
    }
  }

  /** @param {Answer} answer */
  #read(answer) {
    const { status, retryAfter } = answer;
    const wait = retryAfter ? `Try again in ${retryAfter} seconds.` : "Try again later.";
    if (status === 429) throw new TokenAuthError("too_many_attempts", `Too many failed logins. ${wait}`, answer);
    if (status === 503) throw new TokenAuthError("unavailable", `The server is unavailable. ${wait}`, answer);
    const fields = parseJson(answer.text);
    if (status !== 200 || !fields) throw this.#unexpected(answer);
    return fields;
  }

  /** @param {Answer} answer */
  #unexpected({ status, text }) {
    const description = parseJson(text)?.error_description;
    const reason = typeof description === "string" ? description : "is this the URL of a tokenauth server?";
    const message = `${this.#url} answered ${status}: ${reason}`;
    return new TokenAuthError("unexpected_answer", message, { status });
  }

  #save() {
    try {
      if (this.#login) this.#storage?.setItem(this.#key, JSON.stringify({ ...this.#login, asking: undefined }));
      else this.#storage?.removeItem(this.#key);
    } catch {
      // The storage is full: the login ends with the page.
    }
  }

  /** @returns {Login | undefined} */
  #restore() {
    try {
      const login = JSON.parse(this.#storage?.getItem(this.#key) ?? "null");
      const { token, username, expiresAt } = login;
      const usable = isToken(token) && typeof username === "string" && typeof expiresAt === "number";
      if (usable && isTime(expiresAt / 1000) && expiresAt > Date.now()) return login;
    } catch {
      // Something else wrote it.
    }
    this.#storage?.removeItem(this.#key);
    return undefined;
  }
}

/**
 * Return whether it can be sent in a header.
 * @param {unknown} value
 * @returns {value is string}
 */
function isToken(value) {
  return typeof value === "string" && /^[\x21-\x7e]+$/.test(value);
}

/**
 * Return whether it is a time in seconds that a Date can have.
 * @param {unknown} value
 * @returns {value is number}
 */
function isTime(value) {
  return typeof value === "number" && value >= 0 && value <= LATEST;
}

/**
 * Compare as the server does: by NFKC and case folding.
 * @param {string} one
 * @param {string} other
 */
function isSameUser(one, other) {
  return canonical(one) === canonical(other);
}

/** @param {string} username */
function canonical(username) {
  // Each character alone, since the lower case of a final sigma is another one. Three times, since "ß" folds to "ss".
  const fold = (/** @type {string} */ letter) => letter.toLowerCase().toUpperCase().toLowerCase();
  const letters = Array.from(username.normalize("NFKC"), (letter) => (letter === "ı" ? letter : fold(letter)));
  return letters.join("").normalize("NFKC");
}

/**
 * Convert the end of a valid token. It has not passed, even if it has by this computer's clock, which may be wrong.
 * @param {number} seconds
 */
function toLocalTime(seconds) {
  return seconds * 1000 > Date.now() ? seconds * 1000 : Date.now() + RECHECK;
}

/**
 * Wait for the promise, unless the signal aborts before.
 * @param {AbortSignal} signal
 * @param {Promise<void>} promise
 */
function unlessAborted(signal, promise) {
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}

/** @param {string} text */
function parseJson(text) {
  try {
    return Object(JSON.parse(text));
  } catch {
    return undefined;
  }
}

/** Storage is denied to sandboxed pages, and where a person has blocked it: the login is then kept in memory. */
function findSessionStorage() {
  try {
    return globalThis.sessionStorage;
  } catch {
    return undefined;
  }
}

/** @param {string | URL | undefined} text */
function parseServer(text) {
  try {
    const url = text === undefined ? new URL(".", import.meta.url) : new URL(text, location.href);
    if (!url.pathname.endsWith("/")) url.pathname += "/";
    if (/^https?:$/.test(url.protocol)) return url;
  } catch {
    // refused below
  }
  throw invalidOption("url", text ?? import.meta.url, 'a URL such as "https://auth.example.com"');
}

/** @param {string} text */
function checkOrigin(text) {
  try {
    if (new URL(text).origin === text) return text;
  } catch {
    // refused below
  }
  throw invalidOption("origins", text, 'an origin such as "https://api.example.com", without a path');
}

/** @template {string} T @param {string} name @param {T} value @param {readonly T[]} values */
function oneOf(name, value, values) {
  if (values.includes(value)) return value;
  throw invalidOption(name, value, values.map((each) => `"${each}"`).join(" or "));
}

/** @param {string} name @param {unknown} value @param {string} expected */
function invalidOption(name, value, expected) {
  return new TokenAuthError("invalid_option", `${name}: must be ${expected}, not "${value}".`);
}
