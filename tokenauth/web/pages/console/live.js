// Hints of the service to read something again. They come over a stream of events. While there is no stream, everything
// is read again every few seconds instead.

import { Offline, now, onChange, renew, send } from "./api.js";

const POLL = 5_000;
const UPKEEP = 30_000; // what ends by itself, such as a lease, may come without an event
const AGAIN = 60_000; // until a stream that the service refuses is tried again
const RENEWAL = 60; // seconds: reading keeps no login alive, and what the person does is a use
const SILENCE = 40_000; // a stream has a line every 15 seconds

const readers = new Set();
let stopped = new AbortController();
let streaming = false;
let readAt = 0;
let failed = false; // since then, something could not be read

/** Call `read` when something of these topics has changed: "tokens", "pool", "pool:NAME", "throttle", "status";
 * "hello" (a stream begins, or the scopes of the user have changed), "reconnected". `always`: also when everything is
 * read again. */
export function subscribe(topics, read, { always = true } = {}) {
  const reader = { topics: new Set(topics), read, always };
  readers.add(reader);
  return () => readers.delete(reader);
}

/** Have everything read again. */
export function readAll() {
  readAt = now();
  failed = false;
  readers.forEach((reader) => reader.always && reader.read());
}

function notify(...topics) {
  readers.forEach((reader) => topics.some((topic) => reader.topics.has(topic)) && reader.read());
}

/** Follow the events of this login until `stop`. */
export function start() {
  stop();
  stopped = new AbortController();
  const { signal } = stopped;
  follow(signal);
  const timer = setInterval(() => {
    const due = (streaming && !failed ? UPKEEP : POLL) / 1000;
    if (!document.hidden && now() - readAt >= due) readAll();
  }, 1000);
  const readWhenShown = () => document.hidden || readAll();
  document.addEventListener("visibilitychange", readWhenShown);
  let renewedAt = now();
  let renewable = true;
  const active = async () => {
    if (!renewable || now() - renewedAt < RENEWAL) return;
    renewedAt = now();
    renewable = await renew();
  };
  document.addEventListener("keydown", active);
  document.addEventListener("pointerdown", active);
  const forget = onChange((event) => (failed ||= event === "offline"));
  signal.addEventListener("abort", () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", readWhenShown);
    document.removeEventListener("keydown", active);
    document.removeEventListener("pointerdown", active);
    forget();
  });
}

export function stop() {
  stopped.abort();
  streaming = false;
}

/**
 * Follow the stream while the page is shown: browsers have 6 connections for all tabs of a host, and tabs in the
 * background would use them up.
 */
async function follow(signal) {
  let last = null;
  let pause = 1000;
  let missed = false;
  while (!signal.aborted) {
    await shown(signal);
    const connection = new AbortController();
    const close = () => connection.abort();
    const hide = () => document.hidden && close();
    signal.addEventListener("abort", close, { once: true });
    document.addEventListener("visibilitychange", hide);
    try {
      const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
      const answer = await send("GET", "api/events", { headers, signal: connection.signal });
      if (answer.ok && answer.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        pause = 1000;
        readAll(); // the events are of what changes from now on
        if (missed) notify("reconnected");
        for await (const event of events(answer.body, connection.signal)) {
          streaming = true;
          last = event.id ?? last;
          handle(event);
        }
      } else {
        await answer.body?.cancel();
        pause = answer.status >= 500 ? 5000 : AGAIN;
        if (answer.status === 401) readAll(); // which finds that the login is over
      }
    } catch (error) {
      pause = error instanceof Offline ? Math.min(pause * 2, 15_000) : 1000;
    }
    signal.removeEventListener("abort", close);
    document.removeEventListener("visibilitychange", hide);
    const ended = streaming && !connection.signal.aborted;
    streaming = false;
    if (ended) readAll(); // also finds out whether the login is over
    missed = true;
    if (!connection.signal.aborted) await sleep(pause * (0.75 + Math.random() / 2), signal);
  }
}

/** Wait until the page is shown. */
function shown(signal) {
  return new Promise((done) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      done();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
    look();
  });
}

function handle(event) {
  if (event.name === "reset") readAll();
  else if (event.name === "pool") notify("pool", `pool:${parse(event.data).name}`);
  else notify(event.name);
}

function parse(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    return {};
  }
}

/** Yield the events of a stream (HTML Standard, section 9.2.6). Ends when it is silent for too long. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let timer;
  const watchdog = () => {
    clearTimeout(timer);
    timer = setTimeout(() => reader.cancel().catch(() => {}), SILENCE);
  };
  try {
    for (watchdog(); !signal.aborted; watchdog()) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = { name: "message", data: "", id: null };
        for (const line of block.split(/\r?\n/)) {
          const [, field, content] = /^(\w*): ?(.*)$/.exec(line) ?? [null, line, ""];
          if (field === "event") event.name = content;
          else if (field === "data") event.data += content;
          else if (field === "id") event.id = content;
        }
        if (event.name !== "message" || event.data) yield event;
      }
    }
  } finally {
    clearTimeout(timer);
    reader.cancel().catch(() => {});
  }
}

function sleep(milliseconds, signal) {
  return new Promise((done) => {
    const wake = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", wake);
      done();
    };
    const timer = setTimeout(wake, milliseconds);
    signal.addEventListener("abort", wake);
  });
}
