// Mine: my logins, my named tokens, my leases and my places in line.

import { call, path } from "./api.js";
import { useData } from "./data.js";
import { Actions, Loaded, Secret, Table, Time, ask, say } from "./parts.js";
import { html } from "./preact.js";
import { NO_USE, agentName, count } from "./words.js";

const DAY = 86_400;
const LIFETIMES = [
  ["", "As the configuration says"],
  [DAY, "1 day"],
  [7 * DAY, "7 days"],
  [30 * DAY, "30 days"],
  [90 * DAY, "90 days"],
  [365 * DAY, "365 days"],
];
const OVERLAPS = [
  ["", "At once"],
  [900, "In 15 minutes"],
  [3600, "In 1 hour"],
  [DAY, "In 1 day"],
  [7 * DAY, "In 7 days"],
];

const LOOKS = 20; // pages of leases that are read at most: one of them may have none, and yet a next one

export function Mine({ me, logOut }) {
  const tokens = useData("api/tokens", "tokens");
  return html`
    <${Logins} tokens=${tokens} logOut=${logOut} />
    <${NamedTokens} tokens=${tokens} me=${me} />
    <${MyLeases} />
  `;
}

function Logins({ tokens, logOut }) {
  const end = (login) =>
    ask({
      title: "End this login?",
      text: `${agentName(login.user_agent)} from ${login.address || "an unknown address"} is logged out at once.`,
      action: "End login",
      danger: true,
      run: async () => {
        await call("DELETE", path`api/tokens/${login.id}`);
        say("The login is ended.");
        await tokens.reload();
      },
    });
  const endOthers = (others) =>
    ask({
      title: "End all other logins?",
      text: `${count(others, "login")} of yours will be logged out at once, in browsers and programs. Named tokens stay.`,
      action: "End all others",
      danger: true,
      run: async () => {
        const { revoked } = await call("DELETE", "api/tokens?keep=current");
        say(`${count(revoked, "login")} ended.`);
        await tokens.reload();
      },
    });
  const columns = [
    ["What", (login) => html`${agentName(login.user_agent)} ${login.current && html`<strong class="badge">this login</strong>`}`, "first"],
    ["From", (login) => login.address || "unknown"],
    ["Since", (login) => html`<${Time} at=${login.issued_at} />`],
    ["Last use", (login) => html`<${Time} at=${login.last_used_at} never=${NO_USE} />`],
    ["Ends", (login) => html`<${Time} at=${login.expiry_time} />`],
    [
      "Actions",
      (login) =>
        html`<${Actions}
          actions=${[
            login.current
              ? ["Log out", logOut, "Log out of this login"]
              : ["End", () => end(login), `End the login of ${agentName(login.user_agent)}`],
          ]}
        />`,
      "last",
    ],
  ];
  return html`<section aria-labelledby="logins">
    <div class="title">
      <h2 id="logins">My logins</h2>
      <${Others} tokens=${tokens} end=${endOthers} />
    </div>
    <${Loaded} read=${tokens}>
      ${({ tokens: listed }) => {
        const logins = listed.filter((token) => token.kind === "login").sort((one, other) => other.current - one.current);
        return html`<${Table} label="My logins" columns=${columns} rows=${logins} keyOf=${(login) => login.id} empty="You have no logins." />`;
      }}
    <//>
  </section>`;
}

function Others({ tokens, end }) {
  const others = tokens.data?.tokens.filter((token) => token.kind === "login" && !token.current).length;
  return others ? html`<button class="small" onClick=${() => end(others)}>End all others</button>` : null;
}

function NamedTokens({ tokens, me }) {
  const make = () =>
    ask({
      title: "New named token",
      text: "For a program. It needs no password, and can do what you allow it.",
      fields: [
        { name: "name", label: "Name", required: true, maxLength: 64, help: "What it is for, such as nightly-backup." },
        me.scopes.length > 0 && {
          name: "scopes",
          label: "Scopes",
          kind: "choices",
          options: me.scopes.map((scope) => [scope, scope, false]),
          help: "Without a scope it can still use pools that need none, and list and end your tokens.",
        },
        { name: "ttl", label: "Ends in", kind: "select", options: LIFETIMES },
      ].filter(Boolean),
      action: "Make token",
      run: async ({ name, scopes = [], ttl }) => {
        const made = await call("POST", "api/tokens", { name, scopes, ...(ttl && { ttl: Number(ttl) }) });
        tokens.reload();
        return html`<${Secret} value=${made.token} label=${`Token ${made.name}`} />`;
      },
    });
  const rotate = (token) =>
    ask({
      title: `Rotate ${token.name}?`,
      text: "You get a new token with the same name, scopes and lifetime.",
      fields: [
        {
          name: "overlap",
          label: "The old token ends",
          kind: "select",
          options: OVERLAPS,
          help: "At once if it leaked. Later if a program must go on until you have given it the new one.",
        },
      ],
      action: "Rotate",
      run: async ({ overlap }) => {
        const made = await call("POST", path`api/tokens/${token.id}/rotate`, overlap ? { overlap: Number(overlap) } : {});
        tokens.reload();
        return html`<${Secret} value=${made.token} label=${`New token ${made.name}`} />`;
      },
    });
  const end = (token) =>
    ask({
      title: `End ${token.name}?`,
      text: "Programs that use this token are refused at once. It cannot be brought back.",
      action: "End token",
      danger: true,
      run: async () => {
        await call("DELETE", path`api/tokens/${token.id}`);
        say(`The token ${token.name} is ended.`);
        await tokens.reload();
      },
    });
  const columns = [
    ["Name", (token) => html`<span class="name">${token.name}</span> ${token.current && html`<strong class="badge">this token</strong>`}`, "first"],
    ["Scopes", (token) => (token.scopes === null ? "all of mine" : token.scopes.join(", ") || "none")],
    ["Made", (token) => html`<${Time} at=${token.issued_at} />`],
    ["Last use", (token) => html`<${Time} at=${token.last_used_at} never=${NO_USE} />`],
    ["Ends", (token) => html`<${Time} at=${token.expiry_time} />`],
    [
      "Actions",
      (token) =>
        html`<${Actions}
          actions=${[
            me.kind === "login" && ["Rotate", () => rotate(token), `Rotate ${token.name}`],
            ["End", () => end(token), `End ${token.name}`],
          ]}
        />`,
      "last",
    ],
  ];
  return html`<section aria-labelledby="named">
    <div class="title">
      <h2 id="named">My named tokens</h2>
      ${me.kind === "login" && html`<button class="small" onClick=${make}>New named token</button>`}
    </div>
    <${Loaded} read=${tokens}>
      ${({ tokens: listed }) =>
        html`<${Table}
          label="My named tokens"
          columns=${columns}
          rows=${listed.filter((token) => token.kind === "named")}
          keyOf=${(token) => token.id}
          empty="You have no named tokens. A named token lets a program work for you, without your password."
        />`}
    <//>
  </section>`;
}

async function readMine() {
  const leases = [];
  const places = [];
  let next = "";
  for (let look = 0; look < LOOKS && next !== null; look += 1) {
    const page = await call("GET", next ? path`api/leases?after=${next}` : "api/leases");
    leases.push(...page.leases);
    places.push(...page.places);
    next = page.next;
  }
  return { leases, places };
}

function MyLeases() {
  const mine = useData(readMine, "pool");
  const release = (lease) =>
    ask({
      title: `Release ${lease.name ?? "this token"} of ${lease.pool}?`,
      text: `The program that uses it (${lease.holder}) loses it at once.`,
      action: "Release",
      danger: true,
      run: async () => {
        await call("DELETE", path`api/pools/${lease.pool}/leases/${lease.token}`, { holder: lease.holder, fence: lease.fence });
        say("Released.");
        await mine.reload();
      },
    });
  const leave = (place) =>
    ask({
      title: `Leave the line of ${place.pool}?`,
      text: "The program that waits there is refused.",
      action: "Leave the line",
      danger: true,
      run: async () => {
        await call("DELETE", path`api/pools/${place.pool}/requests/${place.request}`);
        say("You have left the line.");
        await mine.reload();
      },
    });
  const leases = [
    ["Pool", (lease) => html`<a href=${path`#pools/${lease.pool}`}>${lease.pool}</a> ${lease.name && html`<span class="name">${lease.name}</span>`}`, "first"],
    ["Holder", (lease) => lease.holder],
    ["Since", (lease) => html`<${Time} at=${lease.leased_at} never="not known" />`],
    ["Ends", (lease) => html`<${Time} at=${lease.lease_expiry_time} />`],
    ["Actions", (lease) => html`<${Actions} actions=${[["Release", () => release(lease), `Release ${lease.name ?? lease.holder} of ${lease.pool}`]]} />`, "last"],
  ];
  const places = [
    ["Pool", (place) => html`<a href=${path`#pools/${place.pool}`}>${place.pool}</a>`, "first"],
    ["Place", (place) => `${place.position} of ${place.waiting}`],
    ["Holder", (place) => place.holder],
    ["Since", (place) => html`<${Time} at=${place.since} />`],
    ["Actions", (place) => html`<${Actions} actions=${[["Leave", () => leave(place), `Leave the line of ${place.pool}`]]} />`, "last"],
  ];
  return html`<section aria-labelledby="my-leases">
    <h2 id="my-leases">My leases and places in line</h2>
    <${Loaded} read=${mine}>
      ${(found) => html`
        <${Table} label="My leases" columns=${leases} rows=${found.leases} keyOf=${(lease) => `${lease.pool} ${lease.token}`} empty="You have no leases." />
        ${found.places.length > 0 &&
        html`<${Table} label="My places in line" columns=${places} rows=${found.places} keyOf=${(place) => `${place.pool} ${place.request}`} />`}
      `}
    <//>
  </section>`;
}
