// Throttle: who has to wait after failed logins, for admins.

import { call, path } from "./api.js";
import { useData } from "./data.js";
import { Actions, Loaded, Table, Time, ask, say } from "./parts.js";
import { html } from "./preact.js";

export function Throttle() {
  const throttle = useData("api/throttle", "throttle");
  const clear = async (address, entry) => {
    await call("DELETE", address);
    const { throttled: left } = await call("GET", "api/throttle");
    const others = elsewhere(left, entry);
    say(`${entry.kind === "network" ? "All unknown users" : entry.user} can log in from ${entry.address} again${others && `; still throttled from ${others}`}.`);
    await throttle.reload();
  };
  const askFirst = (entry, listed) => {
    const others = elsewhere(listed, entry);
    ask({
      title: `Clear the failed logins of ${whoFrom(entry)}?`,
      text: `They are forgotten, and the next login from ${entry.address} is checked at once. If someone guesses passwords there, they have new attempts, too.${others && ` ${entry.user} is also throttled from ${others}, and stays so.`}`,
      action: "Clear",
      run: () =>
        clear(
          entry.kind === "network" ? path`api/throttle?network=${entry.address}` : path`api/throttle?user=${entry.user}&address=${entry.address}`,
          entry,
        ),
    });
  };
  const askWhom = () =>
    ask({
      title: "Clear a user",
      text: "For a user who has to wait and is not in the list, such as one who was refused by another node.",
      fields: [
        { name: "user", label: "User name", required: true, maxLength: 256 },
        { name: "address", label: "Their IP address", required: true, maxLength: 64 },
      ],
      action: "Clear",
      run: ({ user, address }) => clear(path`api/throttle?user=${user}&address=${address}`, { kind: "user", user, address }),
    });
  const columns = (listed) => [
    ["Who", (entry) => html`<span class="name">${whoOf(entry)}</span>`, "first"],
    ["From", (entry) => entry.address],
    ["Failed logins", (entry) => entry.failures],
    ["Waits until", (entry) => html`<${Time} at=${entry.until} />`],
    [
      "Actions",
      (entry) => html`<${Actions} actions=${[entry.kind !== "unknown" && ["Clear", () => askFirst(entry, listed), `Clear ${whoFrom(entry)}`]]} />`,
      "last",
    ],
  ];
  return html`
    <p class="soft">
      After failed logins, tokenauth makes the next ones wait. Here is who was refused by this machine and still has to wait.
      Names that no user has are not shown: one may be a password in the wrong field.
    </p>
    <section aria-labelledby="throttled">
      <div class="title">
        <h2 id="throttled">Throttled logins</h2>
        <button class="small" onClick=${askWhom}>Clear a user</button>
      </div>
      <${Loaded} read=${throttle}>
        ${({ throttled: listed }) =>
          html`<${Table}
            label="Throttled logins"
            columns=${columns(listed)}
            rows=${listed}
            keyOf=${(entry) => `${entry.kind} ${entry.user} ${entry.address}`}
            empty="Nobody has to wait."
          />`}
      <//>
    </section>
  `;
}

function whoOf({ kind, user }) {
  return kind === "user" ? user : kind === "network" ? "all unknown users" : "unknown names";
}

function whoFrom(entry) {
  return entry.kind === "network" ? `all unknown users in ${entry.address}` : `${whoOf(entry)} from ${entry.address}`;
}

/** Return from which other addresses a user has to wait. */
function elsewhere(listed, { kind, user, address }) {
  const same = listed.filter((entry) => kind === "user" && entry.kind === kind && entry.user === user && entry.address !== address);
  return same.map((entry) => entry.address).join(", ");
}
