// Pools: how full they are; and one pool, with who has what since when, and who waits.

import { call, path } from "./api.js";
import { useData } from "./data.js";
import { Actions, Loaded, Meter, Table, Time, ask, say } from "./parts.js";
import { html, useState } from "./preact.js";
import { count } from "./words.js";

const PAGE = 100;
const MOST = 1000;

const REASON = { name: "reason", label: "Reason", maxLength: 256, help: "It is logged. You may leave it out." };

export function Pools() {
  const pools = useData("api/pools", "pool");
  return html`<${Loaded} read=${pools}>
    ${({ pools: listed }) =>
      listed.length
        ? html`<ul class="cards">
            ${listed.map((pool) => html`<${Card} key=${pool.name} pool=${pool} />`)}
          </ul>`
        : html`<p class="soft empty">There are no pools that you may use. They are defined in the configuration.</p>`}
  <//>`;
}

function Card({ pool }) {
  return html`<li>
    <h2><a href=${path`#pools/${pool.name}`}>${pool.name}</a></h2>
    <${Meter} used=${pool.leased} of=${pool.capacity ?? pool.leased + pool.available} label=${`Leased in ${pool.name}`} />
    <${Counts} pool=${pool} />
  </li>`;
}

function Counts({ pool }) {
  const counts = [
    [pool.leased, "leased"],
    [pool.available, "free"],
    ...(pool.reserved === undefined ? [] : [[pool.reserved, "reserved"]]),
    [pool.waiting, "waiting"],
    ...(pool.capacity === null ? [] : [[pool.capacity, "in all"]]),
  ];
  return html`<p class="counts">
    ${counts.map(([number, what]) => html`<span key=${what}><strong>${number.toLocaleString("en")}</strong> ${what}</span>`)}
  </p>`;
}

export function Pool({ name, me }) {
  const [limit, setLimit] = useState(PAGE);
  const address = path`api/pools/${name}`;
  const pool = useData(`${address}?limit=${limit}`, `pool:${name}`);
  const line = useData(`${address}/requests?limit=${PAGE}`, `pool:${name}`);
  const reload = () => Promise.all([pool.reload(), line.reload()]);
  const more = () => setLimit(MOST);
  return html`
    <p><a href="#pools">All pools</a></p>
    <${Loaded} read=${pool}>
      ${(found) => {
        const manager = found.manager;
        return html`
          <section aria-labelledby="tokens">
            <h2 id="tokens">${found.tokens.some((token) => token.name) ? "Members" : manager ? "Tokens" : "Leases"}</h2>
            <${Meter} used=${found.leased} of=${found.capacity ?? found.leased + found.available} label="Leased" />
            <${Counts} pool=${found} />
            <${Tokens} pool=${found} address=${address} me=${me} manager=${manager} reload=${reload} />
            ${found.next !== null &&
            (limit < MOST
              ? html`<p><button class="small" onClick=${more}>Show more</button></p>`
              : html`<p class="soft">These are the first ${MOST.toLocaleString("en")}.</p>`)}
          </section>
          <${Line} name=${name} address=${address} line=${line} me=${me} manager=${manager} reload=${reload} />
        `;
      }}
    <//>
  `;
}

function Tokens({ pool, address, me, manager, reload }) {
  const nameOf = (token) => token.name ?? (token.token ? `${token.token.slice(0, 8)}…` : "a token");
  /** Who can get a token when its lease ends. */
  const next = (token) => {
    if (token.reservation?.for) return `Only ${token.reservation.for} can get it then, until the reservation ends.`;
    if (token.reservation) return "Nobody gets it then, until the reservation ends.";
    if (pool.waiting > 0) return token.name ? "The next in line whom it suits gets it." : "The next in line gets it.";
    return "It is free then.";
  };
  const actions = (token) => {
    const name = nameOf(token);
    const mine = token.user === me.username;
    const check = { holder: token.holder, fence: token.fence };
    const lease = token.token && path`/leases/${token.token}`;
    const member = token.name && path`/members/${token.name}/reservation`;
    const release = () =>
      ask({
        title: `Release ${name}?`,
        text: `The program that uses it (${token.holder}) loses it. ${next(token)}`,
        action: "Release",
        danger: true,
        run: async () => {
          await call("DELETE", address + lease, check);
          say(`${name} is released.`);
          await reload();
        },
      });
    const end = () =>
      ask({
        title: `End the lease of ${name}?`,
        text: `${holderOf(token)} loses it at once. ${next(token)}${token.name && !token.reservation ? " Is it broken or still in use? Cancel, and reserve it first." : ""}`,
        fields: [REASON],
        action: "End lease",
        danger: true,
        run: async ({ reason }) => {
          await call("DELETE", `${address}${lease}?force=true`, { fence: token.fence, ...(reason && { reason }) });
          say(`The lease of ${name} is ended.`);
          await reload();
        },
      });
    const take = () =>
      ask({
        title: `Take over ${name}?`,
        text: `${holderOf(token)} loses it at once, and you have it in the same step: nobody comes between. Your lease ends by itself after the time that the pool gives.`,
        fields: [REASON],
        action: "Take over",
        danger: true,
        run: async ({ reason }) => {
          await call("DELETE", `${address}${lease}?force=true&take=true`, { fence: token.fence, ...(reason && { reason }) });
          say(`You have ${name}.`);
          await reload();
        },
      });
    const reserve = () =>
      ask({
        title: `Reserve ${name}`,
        text: `${token.holder === undefined ? "Nobody" : `${mine ? "Your" : `${token.user ?? token.holder}'s`} lease goes on until it ends. Then nobody`} gets ${name} until the reservation is over.`,
        fields: [
          { name: "until", label: "For how long", required: true, value: "2h", help: "Such as 30m, 2h or 7d, at most 366 days." },
          { name: "note", label: "Note", maxLength: 256, value: token.reservation?.note ?? "", help: "Everyone who uses the pool sees it." },
          { name: "user", label: "For", maxLength: 256, value: token.reservation?.for ?? "", help: "A user who may lease it all the same. Empty: nobody." },
        ],
        action: "Reserve",
        run: async ({ until, note, user }) => {
          const force = token.reservation ? "?force=true" : "";
          await call("PUT", address + member + force, { until, ...(note && { note }), ...(user && { for: user }) });
          say(`${name} is reserved.`);
          await reload();
        },
      });
    const unreserve = () =>
      ask({
        title: `End the reservation of ${name}?`,
        text: `It is reserved by ${reservedBy(token.reservation)}${token.reservation.note ? `: ${token.reservation.note}` : ""}.`,
        action: "End reservation",
        run: async () => {
          await call("DELETE", address + member);
          say(`${name} is no longer reserved.`);
          await reload();
        },
      });
    return [
      mine && token.token && ["Release", release, `Release ${name}`],
      manager && token.holder !== undefined && !mine && ["End lease", end, `End the lease of ${name}`],
      manager && token.holder !== undefined && !mine && ["Take over", take, `Take over ${name}`],
      manager && token.name && [token.reservation ? "Change" : "Reserve", reserve, `${token.reservation ? "Change the reservation of" : "Reserve"} ${name}`],
      manager && token.reservation && ["Unreserve", unreserve, `End the reservation of ${name}`],
    ];
  };
  const members = pool.tokens.some((token) => token.name);
  const columns = [
    [
      members ? "Member" : "Token",
      (token) => html`<span class="name">${nameOf(token)}</span>${" "}
        ${token.labels?.map((label) => html`<span class="badge" key=${label}>${label}</span>`)}
        ${token.note && html`<div class="soft small">${token.note}</div>`}`,
      "first",
    ],
    ["Leased by", (token) => (token.holder !== undefined ? holderOf(token) : token.reservation ? "–" : html`<span class="free">free</span>`)],
    ["Since", (token) => html`<${Time} at=${token.leased_at} never="–" />`],
    [
      "Ends",
      (token) => html`<${Time} at=${token.lease_expiry_time} never="–" />
        ${token.max_expiry_time && html`<div class="soft small">at the latest <${Time} at=${token.max_expiry_time} /></div>`}`,
    ],
    ...(members ? [["Reserved", (token) => html`<${Reservation} reservation=${token.reservation} />`]] : []),
    ["Actions", (token) => html`<${Actions} actions=${actions(token)} />`, "last"],
  ];
  return html`<${Table}
    label=${members ? "Members" : "Tokens"}
    columns=${columns}
    rows=${pool.tokens}
    keyOf=${(token) => token.name ?? token.token ?? `${token.user} ${token.holder} ${token.fence}`}
    rowClass=${(token) => (token.user === me.username ? "mine" : "")}
    empty=${manager ? "The pool has no tokens." : "No token is leased."}
  />`;
}

function Reservation({ reservation }) {
  if (!reservation) return "–";
  return html`ends <${Time} at=${reservation.until} />, by ${reservedBy(reservation)}${reservation.for && ` for ${reservation.for}`}
    ${reservation.note && html`<div class="soft small">${reservation.note}</div>`}`;
}

function reservedBy({ by }) {
  return by ?? "the server's operator";
}

function holderOf({ user, holder }) {
  return user === null ? `${holder} (no user)` : user === holder ? user : `${user}, ${holder}`;
}

function Line({ name, address, line, me, manager, reload }) {
  const remove = (place) => {
    const mine = place.user === me.username;
    ask({
      title: mine ? `Leave the line of ${name}?` : `Remove ${holderOf(place)} from the line?`,
      text: "The program that waits there is refused.",
      action: mine ? "Leave the line" : "Remove",
      danger: true,
      run: async () => {
        await call("DELETE", address + path`/requests/${place.request}` + (mine ? "" : path`?user=${place.user}`));
        say(mine ? "You have left the line." : `${holderOf(place)} no longer waits.`);
        await reload();
      },
    });
  };
  const columns = [
    ["Place", (place) => html`${place.position} ${place.user === me.username && html`<strong class="badge">mine</strong>`}`, "first"],
    ["Who", holderOf],
    ["Since", (place) => html`<${Time} at=${place.since} />`],
    ["Wants", (place) => `${count(place.count, "token")}${place.labels.length ? ` with ${place.labels.join(", ")}` : ""}`],
    ["Priority", (place) => place.priority],
    [
      "Actions",
      (place) =>
        html`<${Actions}
          actions=${[
            place.request &&
              (place.user === me.username
                ? ["Leave", () => remove(place), `Leave place ${place.position}`]
                : manager && ["Remove", () => remove(place), `Remove ${holderOf(place)} from place ${place.position}`]),
          ]}
        />`,
      "last",
    ],
  ];
  return html`<section aria-labelledby="line">
    <h2 id="line">Waiting line</h2>
    <${Loaded} read=${line}>
      ${({ waiting, requests }) => html`
        <${Table}
          label="Waiting line"
          columns=${columns}
          rows=${requests}
          keyOf=${(place) => place.request ?? `${place.position} ${place.user} ${place.since}`}
          rowClass=${(place) => (place.user === me.username ? "mine" : "")}
          empty="Nobody waits."
        />
        ${waiting > requests.length && html`<p class="soft">and ${(waiting - requests.length).toLocaleString("en")} more</p>`}
      `}
    <//>
  </section>`;
}
