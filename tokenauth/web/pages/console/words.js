// Words for people: times, numbers, and names of browsers.

const SPANS = [
  [60, 1, "second"],
  [3600, 60, "minute"],
  [86_400, 3600, "hour"],
  [100 * 86_400, 86_400, "day"],
  [365 * 86_400, 30 * 86_400, "month"],
  [Infinity, 365 * 86_400, "year"],
];

const relative = new Intl.RelativeTimeFormat("en", { numeric: "always" });
const instant = new Intl.DateTimeFormat("en-GB", {
  year: "numeric",
  month: "short",
  day: "numeric",
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  timeZoneName: "short",
});

const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** Return how far away an instant is: "in 5 minutes", "2 hours ago". */
export function fromNow(at, now) {
  const distance = at - now;
  const size = Math.abs(distance);
  if (size < 1) return "now";
  const [, unit, name] = SPANS.find(([limit, unit]) => Math.round(size / unit) * unit < limit);
  return relative.format(Math.sign(distance) * Math.round(size / unit), name);
}

/** Return an instant as the clock on the wall of the reader shows it. */
export function exact(at) {
  return instant.format(at * 1000);
}

/** Return the time of day of an instant. */
export function timeOfDay(at) {
  return time.format(at * 1000);
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** What is said of a token of which no use is known: those of its first hour are not noted. */
export const NO_USE = "none noted";

const BROWSERS = [
  ["Edg/", "Edge"],
  ["OPR/", "Opera"],
  ["Firefox/", "Firefox"],
  ["FxiOS/", "Firefox"],
  ["CriOS/", "Chrome"],
  ["Chrome/", "Chrome"],
  ["Safari/", "Safari"],
];
const SYSTEMS = [
  ["Android", "Android"],
  ["iPhone", "iPhone"],
  ["iPad", "iPad"],
  ["Windows", "Windows"],
  ["Mac OS X", "macOS"],
  ["CrOS", "ChromeOS"],
  ["Linux", "Linux"],
];

/** Return a short name of what sent a User-Agent, as the login page has it. */
export function agentName(userAgent) {
  if (!userAgent) return "A program";
  if (userAgent.startsWith("Mozilla/")) {
    const [browser, system] = [BROWSERS, SYSTEMS].map((known) => known.find(([mark]) => userAgent.includes(mark))?.[1]);
    if (browser && system) return `${browser} on ${system}`;
  }
  return userAgent.length <= 40 ? userAgent : `${userAgent.slice(0, 39)}…`;
}
