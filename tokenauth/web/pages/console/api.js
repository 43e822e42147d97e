// The public API of this service. A token that was got with a password stays in this module: nothing keeps it longer
// than the page is open. Addresses are relative, so that the console also works below a prefix of a reverse proxy.

const HEADER = "X-Tokenauth-Console"; // with it, the API accepts the login page's cookie from this page
const TIMEOUT = 20_000;
const WRONG_PASSWORD = { error: "invalid_credentials", error_description: "The user name or the password is wrong." };

let token = null;
let ahead = 0; // seconds by which the server's clock is ahead of this one
let online = true;
let failures = 0; // requests without an answer
const listeners = new Set();

/** The service did not answer, or something in front of it answered instead. */
export class Offline extends Error {
  constructor() {
    super("tokenauth does not answer.");
  }
}

/** The service refused a request. `message` is its own description. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/**
 * Call `listener` with "offline" (a request had no answer), "online" (a later one has) and "ended" (the login is over).
 * Returns how to stop that.
 */
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function notify(event) {
  listeners.forEach((listener) => listener(event));
}

function setOffline() {
  online = false;
  failures += 1;
  notify("offline");
}

/** `before`: the failures before the request that was answered. One that went beside it may have failed since. */
function setOnline(before) {
  if (online || before !== failures) return;
  online = true;
  notify("online");
}

/** Unix seconds by the server's clock: the times that it sends are compared with this. */
export function now() {
  return Date.now() / 1000 + ahead;
}

export function hasToken() {
  return token !== null;
}

/** Return the path of a route, with each parameter escaped: path`api/pools/${name}`. */
export function path(strings, ...values) {
  return strings.reduce((text, part, index) => text + encodeURIComponent(values[index - 1]) + part);
}

/**
 * Send a request with the token of this page, and return the response. Throws Offline. `as`: another token in its
 * place, or null for none.
 */
export async function send(method, address, options = {}) {
  const { headers = {}, body, as, signal = AbortSignal.timeout(TIMEOUT) } = options;
  const all = { [HEADER]: "1", Accept: "application/json", ...headers };
  const sent = as === undefined ? token : as;
  if (sent !== null) all["X-Token"] = sent;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(address, {
      method,
      headers: all,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: as === undefined ? "same-origin" : "omit",
      redirect: "error",
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setOffline();
    throw new Offline();
  }
  const date = Date.parse(answer.headers.get("Date"));
  if (Math.abs(date - Date.now() - ahead * 1000) > 2000) ahead = (date - Date.now()) / 1000;
  return answer;
}

/** Send a request, and return the document of the answer. Throws Refused or Offline. `as`: see `send`. */
export async function call(method, address, body, as) {
  const sent = token;
  const before = failures;
  const answer = await send(method, address, { body, as });
  const document = await read(answer);
  if (answer.ok ? document === undefined : !document?.error_description) {
    setOffline(); // a proxy answers in place of the service, or the answer was cut off
    throw new Offline();
  }
  setOnline(before);
  if (answer.ok) return document;
  // A refused login, another token, and an answer to an earlier login say nothing about this one.
  if (answer.status === 401 && document !== WRONG_PASSWORD && as === undefined && sent === token) {
    token = null;
    notify("ended");
  }
  throw new Refused(answer.status, document.error, document.error_description);
}

/** Return the document of an answer; undefined if it has none. */
async function read(answer) {
  if (answer.status === 204) return null;
  const text = await answer.text().catch(() => "");
  if (answer.status === 401 && text === "invalid credentials") return WRONG_PASSWORD;
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Return who is logged in, by the token or by the login page's cookie, or null. */
export function whoAmI() {
  return whoIs(undefined);
}

/** Return whose token a value is, or null. This is no use of it. */
export async function whoIs(value) {
  try {
    return await call("GET", "api/me", undefined, value);
  } catch (error) {
    // Without a login page, the cookie is not read, and the API asks for a token.
    if (error instanceof Refused && error.status === 401) return null;
    throw error;
  }
}

/** Log in with a password. Throws Refused. */
export async function logIn(username, password) {
  token = null;
  token = (await call("POST", "api/token", { username, password })).token;
}

/** Log in with a token that the user has. */
export function useToken(value) {
  token = value;
}

/**
 * End a token of a user, of which the value is known. Returns whether that is written: while the database cannot be
 * written, a log-out with the value is held in memory.
 */
export async function endLeaked({ id, user, value }) {
  try {
    await call("DELETE", path`api/tokens/${id}?user=${user}`);
  } catch (error) {
    if (!(error instanceof Refused) || ![404, 503].includes(error.status)) throw error;
    if (error.status === 503) {
      await call("DELETE", "api/token", { token: value }, null);
      return false;
    }
  }
  return true;
}

/** Extend the login, as each use of it does. Reading does not. Returns false if its lifetime is fixed. */
export async function renew() {
  try {
    await call("POST", "api/token/renew");
    return true;
  } catch (error) {
    return !(error instanceof Refused && error.code === "not_renewable");
  }
}

/** Forget the token of this page, and end it. A late answer says nothing about the next login. */
export async function logOut() {
  const ended = token;
  token = null;
  await call("DELETE", "api/token", undefined, ended);
}
