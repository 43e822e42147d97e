// Finds tokens in a text, in the page: as `values.py` does in a log-out, so that whatever a log-out ends is found.

const LENGTH = 64;
const DECODINGS = 2; // nested encodings, such as JSON in a form
const PREFIX = "tkn"; // of named tokens
const CHECKSUM = 6;
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

const COLOUR = /(?:\x1b|\\033|\\e|\^\[)\[[0-?]*[ -/]*[@-~]/g; // of terminals
const BREAK = /\n[ \t>+|#*/\n-]*/g; // with what mail, diffs and comments put before a line
const EVERY_OTHER_BREAK = /\n[ \t>+|#*/-]*([^\n]*\n*)/g;

// The order matters. The last one makes the text quoted-printable.
const ESCAPES = [
  ["\\\\", "\\"],
  ["\\n", "\n"],
  ["\\r", "\n"],
  ["\\t", "\n"],
  ["\r", "\n"],
  ["\\u00", "%"],
  ["\\x", "%"],
  ["%u00", "%"],
  ["+", " "],
  ["=", "%3D"],
  ["%", "="],
];

/** Return what in a text has the form of a token, in the usual encodings, each once. */
export function findValues(text) {
  const found = new Set();
  for (const variant of variants(text.replaceAll("\0", ""))) {
    for (const [word] of variant.matchAll(/[A-Za-z0-9]{64,}/g)) {
      if (word.length === LENGTH) found.add(word);
      else namedValues(word).forEach((value) => found.add(value));
    }
  }
  return [...found];
}

/** The text and its decodings, each also without colours, with its lines joined and without blanks. */
function* variants(text) {
  for (let decoding = 0; decoding <= DECODINGS; decoding += 1) {
    yield* rejoined(text);
    if (text.search(COLOUR) >= 0) {
      yield* rejoined(text.replace(COLOUR, ""));
      yield* rejoined(text.replace(COLOUR, " "));
    }
    const decoded = decode(text);
    if (decoded === text) return;
    text = decoded;
  }
}

function decode(text) {
  const plain = text
    .replaceAll("&amp;", "&")
    .replace(/&#0*([0-9]{1,3});/g, (_, code) => (code >= 32 && code < 127 ? String.fromCharCode(code) : " "))
    .replace(/&#[xX]0*([0-9a-fA-F]{2});/g, "%$1");
  return unquote(ESCAPES.reduce((sofar, [escape, meant]) => sofar.replaceAll(escape, meant), plain));
}

/** Decode quoted-printable (RFC 2045 section 6.7). */
function unquote(text) {
  return text.replace(/=(?:\r?\n|([0-9A-Fa-f]{2}))/g, (_, code) => (code ? String.fromCharCode(Number.parseInt(code, 16)) : ""));
}

function* rejoined(text) {
  for (const variant of new Set([text, ...joined(text)])) {
    const lines = variant.replaceAll("\r", "").replace(/\n[ \t]?/g, "");
    yield* new Set([variant, lines, lines.replace(/[ \t\v\f]/g, "")]);
  }
  if (text.includes("\n")) {
    const lines = text.replaceAll("\r", "");
    yield lines.replace(BREAK, "");
    yield lines.replace(EVERY_OTHER_BREAK, "$1");
    yield `\n${lines}`.replace(EVERY_OTHER_BREAK, "$1");
  }
}

/** The text with continued lines joined: with a backslash, or quoted-printable. */
function joined(text) {
  const join = (broken) => broken.replaceAll("\r", "").replaceAll("\\\n", "").replaceAll("=\n", "");
  const plain = unquote(text);
  return [join(text), plain, join(plain), unquote(plain)];
}

/** Named tokens in a longer word: their checksum tells where they are. */
function namedValues(word) {
  const found = [];
  for (let at = word.indexOf(PREFIX); at >= 0 && at + LENGTH <= word.length; at = word.indexOf(PREFIX, at + 1)) {
    const value = word.slice(at, at + LENGTH);
    if (value.slice(-CHECKSUM) === checksum(value.slice(0, -CHECKSUM))) found.push(value);
  }
  return found;
}

/** The CRC-32 of a text, in base 62. */
function checksum(text) {
  let rest = -1;
  for (const letter of text) {
    rest ^= letter.charCodeAt(0);
    for (let bit = 0; bit < 8; bit += 1) rest = (rest >>> 1) ^ (rest & 1 ? 0xedb88320 : 0);
  }
  let number = ~rest >>> 0;
  let digits = "";
  for (let place = 0; place < CHECKSUM; place += 1) {
    digits = DIGITS[number % DIGITS.length] + digits;
    number = Math.floor(number / DIGITS.length);
  }
  return digits;
}
