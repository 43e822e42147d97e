// Health: workers, store, queue, risks, and the last hour in charts, for admins.

import { Offline, Refused, send } from "./api.js";
import { useData } from "./data.js";
import { Chart } from "./chart.js";
import { Loaded, Table, Time } from "./parts.js";
import { html, useEffect, useState } from "./preact.js";
import { count } from "./words.js";

const CHARTS = [
  ["logins", "Logins", "a minute", true],
  ["failures", "Failed logins", "a minute", true],
  ["validations", "Validations", "a minute", true],
  ["leases", "Leases", "at a time", false],
  ["waiting", "Waiting for a lease", "at a time", false],
];

let last = {}; // what was read, and when: also for who opens this view while the service cannot be read

export function Health() {
  const status = useData("api/status", "status");
  if (status.data) last = { data: status.data, at: status.at };
  const outage = status.error instanceof Offline || status.error?.code === "store_unavailable";
  return html`
    ${outage && html`<${Outage} error=${status.error} />`}
    <${Loaded} read=${status.error ? { ...status, ...last } : status}>
      ${(found) => html`
        <${Facts} status=${found} outage=${outage} />
        <section aria-labelledby="hour">
          <h2 id="hour">The last hour</h2>
          <div class="charts">
            ${CHARTS.map(
              ([key, title, unit, counts]) =>
                html`<${Chart} key=${key} title=${title} unit=${unit} counts=${counts} values=${found.history[key]} end=${found.history.end} step=${found.history.step} />`,
            )}
          </div>
        </section>
        <${Risks} risks=${found.risks} />
        <${Workers} workers=${found.workers} />
        <${PoolTotals} pools=${found.pools} />
        <${Totals} totals=${found.totals} />
      `}
    <//>
  `;
}

/** How the store is while its status cannot be read, by /readyz, which needs no token. */
function Outage({ error }) {
  const [reason, setReason] = useState(null);
  useEffect(() => {
    let current = true;
    const look = async () => {
      const answer = await send("GET", "readyz", { as: null });
      const { reason: found = null } = await answer.json();
      if (current) setReason(found);
    };
    look().catch(() => current && setReason(null)); // it does not answer, or the proxy forwards no such address
    return () => (current = false);
  }, [error]);
  const answers = error instanceof Refused;
  return html`<div class="facts">
    <${Fact} title="Store" value=${answers ? "unavailable" : "not known"} bad>
      ${answers ? `now: ${reason ?? "requests are answered 503"}` : "tokenauth does not answer"}
    <//>
  </div>`;
}

function Facts({ status, outage }) {
  const { store, workers } = status;
  const missing = status.workers_configured - workers.length;
  return html`
    <div class="facts">
      <${Fact} title="Version" value=${status.version}>started <${Time} at=${status.started_at} /><//>
      <${Fact} title="Workers" value=${`${workers.length} of ${status.workers_configured}`} bad=${missing > 0}>
        ${missing > 0 ? "a worker is being replaced" : "all are running"}, ${count(status.worker_crashes, "crash", "crashes")}
      <//>
      ${!outage &&
      html`<${Fact} title="Store" value=${store.up === null ? "not known yet" : store.up ? "up" : "unavailable"} bad=${store.up === false}>
        ${store.kind}, schema ${store.schema}
      <//>`}
      <${Fact} title="Revocation feed" value=${store.feed_age === null ? "not known yet" : `${store.feed_age.toFixed(1)} s old`} bad=${store.feed_age > 5}>
        ${store.revocations_held ? html`<strong>${count(store.revocations_held, "revocation")} not written yet</strong>` : "all revocations are written"}
      <//>
      <${Audit} audit=${status.audit} />
      <${Fact} title="Live tokens" value=${store.live_tokens === null ? "not known yet" : store.live_tokens.toLocaleString("en")}>
        ${count(status.totals.throttle_refusals, "login")} throttled since the start
      <//>
      <${Fact} title="Password queue" value=${status.password_queue} bad=${status.password_queue > 20}>logins that wait to be checked<//>
    </div>
  `;
}

function Audit({ audit }) {
  if (!audit) return html`<${Fact} title="Audit log" value="off">the configuration has none<//>`;
  const value = audit.up === null ? "not known yet" : audit.up ? "up" : "not writable";
  return html`<${Fact} title="Audit log" value=${value} bad=${audit.up === false || audit.lost > 0}>
    ${audit.lost > 0 ? html`<strong>${count(audit.lost, "act is", "acts are")} missing in it</strong>` : audit.up === false ? "acts are held in memory" : "no act is missing"}
  <//>`;
}

function Risks({ risks }) {
  return html`<section aria-labelledby="risks">
    <h2 id="risks">Risks</h2>
    ${risks.length
      ? html`<ul class="risks">
          ${risks.map((risk) => html`<li key=${risk.name}><strong>${risk.name}</strong> ${risk.text}</li>`)}
        </ul>`
      : html`<p class="soft empty">The configuration has no setting that is unsafe on a public address.</p>`}
  </section>`;
}

function Workers({ workers }) {
  return html`<section aria-labelledby="workers">
    <h2 id="workers">Workers</h2>
    <${Table}
      label="Workers"
      columns=${[
        ["Process", (worker) => worker.pid, "first"],
        ["Started", (worker) => html`<${Time} at=${worker.started_at} />`],
      ]}
      rows=${workers}
      keyOf=${(worker) => worker.pid}
      empty="No worker has reported yet."
    />
  </section>`;
}

function Fact({ title, value, bad, children }) {
  return html`<div class=${bad ? "fact bad" : "fact"}>
    <h2>${title}</h2>
    <p class="value">${bad && html`<span class="sign" aria-hidden="true">!</span><span class="hidden">Problem: </span>`}${value}</p>
    <p class="soft small">${children}</p>
  </div>`;
}

function PoolTotals({ pools }) {
  const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
  const columns = [
    ["Pool", (pool) => html`<a href=${`#pools/${encodeURIComponent(pool.name)}`}>${pool.name}</a>`, "first"],
    ["Leased", (pool) => `${number(pool.leased)} of ${pool.capacity === null ? "any number" : number(pool.capacity)}`],
    ["Waiting", (pool) => number(pool.waiting)],
    ["Granted", (pool) => number(pool.granted)],
    ["Denied", (pool) => number(pool.denied)],
    ["Lapsed", (pool) => number(pool.lapsed)],
    ["Ended by force", (pool) => number(pool.forced)],
  ];
  return html`<section aria-labelledby="pools">
    <h2 id="pools">Pools since the start</h2>
    <${Table} label="Pools" columns=${columns} rows=${pools} keyOf=${(pool) => pool.name} empty="The configuration has no pools." />
  </section>`;
}

function Totals({ totals }) {
  const rows = ["logins", "validations"].flatMap((kind) =>
    Object.entries(totals[kind])
      .filter(([, number]) => number > 0)
      .map(([result, number]) => ({ kind, result: result.replaceAll("_", " "), number })),
  );
  const columns = [
    ["What", ({ kind }) => kind, "first"],
    ["Result", ({ result }) => result],
    ["Number", ({ number }) => number.toLocaleString("en")],
  ];
  return html`<section aria-labelledby="totals">
    <h2 id="totals">Since the start</h2>
    <${Table} label="Since the start" columns=${columns} rows=${rows} keyOf=${({ kind, result }) => `${kind} ${result}`} empty="Nothing has happened yet." />
  </section>`;
}
