// Tokens: those of all users, for admins.

import { call, endLeaked, path } from "./api.js";
import { useData } from "./data.js";
import { Actions, Loaded, Table, Time, ask, say } from "./parts.js";
import { html, useCallback, useEffect, useState } from "./preact.js";
import { agentName, count } from "./words.js";

const PAGE = 100;
const LOOKS = 20; // pages that one search reads at most: one of them may have no match, and yet a next one

export function Tokens() {
  const [search, setSearch] = useState("");
  const [kind, setKind] = useState("all");
  const [wanted, setWanted] = useState(PAGE);
  const read = useCallback(() => readTokens(search, kind, wanted), [search, kind, wanted]);
  const tokens = useData(read, "tokens");
  return html`
    <${Search} search=${search} setSearch=${setSearch} kind=${kind} setKind=${setKind} />
    <${Loaded} read=${tokens}>
      ${(found) => html`
        <${OfOneUser} tokens=${found.tokens} search=${search} reload=${tokens.reload} />
        <${Found} tokens=${found.tokens} search=${search} reload=${tokens.reload} />
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
  return { tokens, more: next !== null };
}

function Search({ search, setSearch, kind, setKind }) {
  const [text, setText] = useState(search);
  useEffect(() => {
    const timer = setTimeout(() => setSearch(text.trim()), 300);
    return () => clearTimeout(timer);
  }, [text]);
  const leaked = () =>
    ask({
      title: "End leaked tokens",
      text: "Paste the token, or the log or message that has it. All tokens in it end at once, of whatever user.",
      fields: [{ name: "text", label: "Text", kind: "textarea", required: true, help: "It is sent to tokenauth, and kept nowhere. The first 64 KiB count." }],
      action: "End them",
      danger: true,
      run: async ({ text: leak }) => {
        await endLeaked(leak);
        say("Every token in the text has ended.");
      },
    });
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
    <button type="button" onClick=${leaked}>End leaked tokens</button>
  </form>`;
}

/** Where the search is the name of a user: end all of their tokens. */
function OfOneUser({ tokens, search, reload }) {
  if (!tokens.some((token) => token.user === search)) return null;
  const end = () =>
    ask({
      title: `End all tokens of ${search}?`,
      text: `Logins and named tokens end at once, everywhere. While ${search} is in the configuration, they can log in again: remove them first, and reload.`,
      action: "End all",
      danger: true,
      run: async () => {
        const { revoked } = await call("DELETE", path`api/tokens?user=${search}&kind=all`);
        say(`${count(revoked, "token")} of ${search} ended.`);
        await reload();
      },
    });
  return html`<p><button class="small" onClick=${end}>End all tokens of ${search}</button></p>`;
}

function Found({ tokens, search, reload }) {
  const nameOf = (token) => token.name ?? agentName(token.user_agent);
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
    ["What", (token) => html`${nameOf(token)} ${token.name && html`<span class="badge">named</span>`}`],
    ["From", (token) => token.address || "unknown"],
    ["Since", (token) => html`<${Time} at=${token.issued_at} />`],
    ["Last use", (token) => html`<${Time} at=${token.last_used_at} never="none yet" />`],
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
