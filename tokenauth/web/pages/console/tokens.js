// Tokens: those of all users, for admins.

import { call, endLeaked, path, whoIs } from "./api.js";
import { useData } from "./data.js";
import { findValues } from "./leaks.js";
import { Actions, Loaded, Table, Time, ask, say } from "./parts.js";
import { html, useCallback, useEffect, useState } from "./preact.js";
import { NO_USE, agentName, count, exact } from "./words.js";

const PAGE = 100;
const ABREAST = 6; // words of a text that are looked up at a time
const LOOKS = 20; // pages that one search reads at most: one of them may have no match, and yet a next one

export function Tokens() {
  const [search, setSearch] = useState("");
  const [kind, setKind] = useState("all");
  const [wanted, setWanted] = useState(PAGE);
  const read = useCallback(() => readTokens(search, kind, wanted), [search, kind, wanted]);
  const tokens = useData(read, "tokens");
  return html`
    <${Search} search=${search} setSearch=${setSearch} kind=${kind} setKind=${setKind} reload=${tokens.reload} />
    <${Loaded} read=${tokens}>
      ${(found) => html`
        <${OfOneUser} tokens=${found.tokens} search=${found.search} reload=${tokens.reload} />
        <${Found} tokens=${found.tokens} search=${found.search} reload=${tokens.reload} />
        ${found.more && html`<p><button class="small" onClick=${() => setWanted(wanted + 5 * PAGE)}>Show more</button></p>`}
      `}
    <//>
  `;
}

async function readTokens(search, kind, wanted) {
  const tokens = [];
  let next = null;
  for (let look = 0; look < LOOKS && tokens.length < wanted && (next !== null || look === 0); look += 1) {
    const limit = Math.min(1000, wanted - tokens.length);
    const query = { user: "*", kind, limit, ...(search && { search }), ...(next !== null && { after: next }) };
    const page = await call("GET", `api/tokens?${new URLSearchParams(query)}`);
    tokens.push(...page.tokens);
    next = page.next;
  }
  return { tokens, search, more: next !== null };
}

function Search({ search, setSearch, kind, setKind, reload }) {
  const [text, setText] = useState(search);
  useEffect(() => {
    const timer = setTimeout(() => setSearch(text.trim()), 300);
    return () => clearTimeout(timer);
  }, [text]);
  return html`<form class="filter" role="search" onSubmit=${(event) => event.preventDefault()}>
    <div>
      <label for="search">Search</label>
      <input id="search" type="search" placeholder="user, name, address, program or id" value=${text} autocomplete="off" spellcheck=${false} onInput=${(event) => setText(event.target.value)} />
    </div>
    <div>
      <label for="kind">Kind</label>
      <select id="kind" value=${kind} onChange=${(event) => setKind(event.target.value)}>
        <option value="all">All</option>
        <option value="login">Logins</option>
        <option value="named">Named tokens</option>
      </select>
    </div>
    <button type="button" onClick=${() => askForLeak(reload)}>End leaked tokens</button>
  </form>`;
}

function askForLeak(reload) {
  ask({
    title: "End leaked tokens",
    text: "Paste the token, or the log or message that has it. You see whose tokens are in it before any of them ends.",
    fields: [
      { name: "text", label: "Text", kind: "textarea", required: true, help: "It stays in this page. Only words of 64 letters and digits are looked up." },
    ],
    action: "Find tokens",
    run: async ({ text }) => {
      const words = findValues(text);
      const found = await findLive(words);
      if (found.length) return void askToEnd(found, reload);
      return html`<p role="status">
        No live token in the text. ${words.length > 0 && `${count(words.length, "word has", "words have")} the form of a token.`}
      </p>`;
    },
  });
}

/** Return the live tokens with these values, as the API lists them, each with its value. */
async function findLive(values) {
  const found = [];
  for (let at = 0; at < values.length; at += ABREAST) {
    const some = values.slice(at, at + ABREAST);
    found.push(...(await Promise.all(some.map(describe))).filter((token) => token !== null));
  }
  return found.sort((one, other) => one.current - other.current); // who ends their own login can end no other after it
}

async function describe(value) {
  const owner = await whoIs(value);
  if (owner === null) return null;
  const { tokens } = await call("GET", path`api/tokens?user=${owner.username}&kind=all`);
  const listed = tokens.find((token) => token.id === owner.id);
  return { ...owner, user: owner.username, current: false, ...listed, value }; // who has very many has others listed
}

function askToEnd(found, reload) {
  const one = found.length === 1;
  ask({
    title: "Leaked tokens",
    text: `${count(found.length, "live token is", "live tokens are")} in the text. End ${one ? "it, and it is" : "them, and they are"} refused at once, everywhere. Copy what you need to know before: a token that has ended is in no list.`,
    content: html`<${Leaked} tokens=${found} />`,
    action: one ? "End it" : "End them",
    danger: true,
    run: async () => {
      let held = 0;
      for (const token of found) held += (await endLeaked(token)) ? 0 : 1;
      await reload();
      return html`
        <p role="status">
          ${count(found.length, "token")} ended: ${found.map((token) => `${token.user} (${nameOf(token)})`).join(", ")}.${" "}
          ${held > 0 && html`<strong>${held === 1 ? "It is" : "They are"} refused, and held in memory until the database can be written: do not restart tokenauth before.</strong>`}
        </p>
        <${Leaked} tokens=${found} />
      `;
    },
  });
}

function Leaked({ tokens }) {
  return html`<ul class="leaked">
    ${tokens.map(
      (token) => html`<li key=${token.id}>
        <span class="name">${token.user}</span>: ${nameOf(token)} ${token.name && html`<span class="badge">named</span>`}
        ${token.current && html`<strong class="badge">this login</strong>`}
        <${Scopes} token=${token} />
        <div class="soft small">
          from ${token.address || "an unknown address"}${token.name && token.user_agent && `, ${agentName(token.user_agent)}`};
          ${" "}since ${exact(token.issued_at)};
          ${" "}last use ${token.last_used_at ? exact(token.last_used_at) : NO_USE};
          ${" "}id <code>${token.id}</code>
        </div>
      </li>`,
    )}
  </ul>`;
}

/** What a named token may do, which is all of a login. */
function Scopes({ token }) {
  if (token.kind !== "named") return null;
  return html`<div class="soft small">scopes: ${token.scopes === null ? `all of ${token.user}` : token.scopes.join(", ") || "none"}</div>`;
}

function nameOf(token) {
  return token.name ?? agentName(token.user_agent);
}

/** Where the search is the name of a user: end all of their tokens. */
function OfOneUser({ tokens, search, reload }) {
  if (!tokens.some((token) => token.user === search)) return null;
  const end = () =>
    ask({
      title: `End all tokens of ${search}?`,
      text: `Logins and named tokens end at once, everywhere. While ${search} is in the configuration, they can log in again: remove them first, and reload. Their leases go on.`,
      action: "End all",
      danger: true,
      run: async () => {
        const { revoked } = await call("DELETE", path`api/tokens?user=${search}&kind=all`);
        const ended = `${count(revoked, "token")} of ${search} ended.`;
        say(html`${ended}${" "}<${LeasesLeft} user=${search} leases=${await findLeases(search).catch(() => null)} />`);
        await reload();
      },
    });
  return html`<p><button class="small" onClick=${end}>End all tokens of ${search}</button></p>`;
}

/** Return the leases of a user in the pools that this one may use, as [pool, name of the member or null]. */
async function findLeases(user) {
  const { pools } = await call("GET", "api/pools");
  const found = await Promise.all(
    pools
      .filter((pool) => pool.leased > 0)
      .map(async ({ name }) => {
        const leases = [];
        let next = "";
        for (let look = 0; look < LOOKS && next !== null; look += 1) {
          const page = await call("GET", path`api/pools/${name}?limit=1000&after=${next}`);
          leases.push(...page.tokens.filter((token) => token.user === user && token.holder !== undefined));
          next = page.next;
        }
        return leases.map((token) => [name, token.name ?? null]);
      }),
  );
  return found.flat();
}

function LeasesLeft({ user, leases }) {
  if (leases === null) return `Whether ${user} has leases could not be read: look at Pools.`;
  if (!leases.length) return `${user} has no lease in the pools that you may use.`;
  const places = new Map(leases.map(([pool, member]) => [member === null ? pool : `${pool}/${member}`, pool]));
  return html`${user} still has ${count(leases.length, "lease")}:${" "}
  ${[...places].map(([place, pool], index) => html`${index > 0 && ", "}<a key=${place} href=${path`#pools/${pool}`}>${place}</a>`)}.`;
}

function Found({ tokens, search, reload }) {
  const end = (token) =>
    ask({
      title: `End this token of ${token.user}?`,
      text: `${nameOf(token)}${token.address ? ` from ${token.address}` : ""}. It is refused at once, everywhere.`,
      action: "End token",
      danger: true,
      run: async () => {
        await call("DELETE", path`api/tokens/${token.id}?user=${token.user}`);
        say(`The token of ${token.user} is ended.`);
        await reload();
      },
    });
  const columns = [
    ["User", (token) => html`<span class="name">${token.user}</span> ${token.current && html`<strong class="badge">this login</strong>`}`, "first"],
    ["What", (token) => html`${nameOf(token)} ${token.name && html`<span class="badge">named</span>`}<${Scopes} token=${token} />`],
    ["From", (token) => token.address || "unknown"],
    ["Since", (token) => html`<${Time} at=${token.issued_at} />`],
    ["Last use", (token) => html`<${Time} at=${token.last_used_at} never=${NO_USE} />`],
    ["Ends", (token) => html`<${Time} at=${token.expiry_time} />`],
    ["Id", (token) => html`<code title=${token.id}>${token.id.slice(0, 8)}</code>`],
    ["Actions", (token) => html`<${Actions} actions=${[["End", () => end(token), `End ${nameOf(token)} of ${token.user}`]]} />`, "last"],
  ];
  return html`<${Table}
    label="Tokens"
    columns=${columns}
    rows=${tokens}
    keyOf=${(token) => token.id}
    empty=${search ? `No live token matches "${search}".` : "There are no tokens."}
  />`;
}
