// Throttle: who has to wait after failed logins, for admins.

import { call, path } from "./api.js";
import { useData } from "./data.js";
import { Actions, Loaded, Table, Time, ask, say } from "./parts.js";
import { html } from "./preact.js";

export function Throttle() {
  const throttle = useData("api/throttle", "throttle");
  const clear = async (address, held) => {
    await call("DELETE", address);
    const { throttled: left } = await call("GET", "api/throttle");
    const others = elsewhere(left, held);
    say(`${held.kind === "network" ? "Everyone unknown" : held.user} can log in from ${held.address} again${others && `; still throttled from ${others}`}.`);
    await throttle.reload();
  };
  const askFirst = (held, listed) => {
    const others = elsewhere(listed, held);
    ask({
      title: `Clear the failed logins of ${whoFrom(held)}?`,
      text: `They are forgotten, and the next login from ${held.address} is checked at once. If someone guesses passwords there, they have new attempts, too.${others && ` ${held.user} is also throttled from ${others}, and stays so.`}`,
      action: "Clear",
      run: () =>
        clear(
          held.kind === "network" ? path`api/throttle?network=${held.address}` : path`api/throttle?user=${held.user}&address=${held.address}`,
          held,
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
    ["Who", (held) => html`<span class="name">${whoOf(held)}</span>`, "first"],
    ["From", (held) => held.address],
    ["Failed logins", (held) => held.failures],
    ["Waits until", (held) => html`<${Time} at=${held.until} />`],
    [
      "Actions",
      (held) => html`<${Actions} actions=${[held.kind !== "unknown" && ["Clear", () => askFirst(held, listed), `Clear ${whoFrom(held)}`]]} />`,
      "last",
    ],
  ];
  return html`
    <p class="soft">
      After failed logins, tokenauth makes the next ones wait. Here is who was refused by this machine and still has to wait.
      Names that no user has are not shown: one may be a password in the wrong field.
    </p>
    <section aria-labelledby="held">
      <div class="title">
        <h2 id="held">Throttled logins</h2>
        <button class="small" onClick=${askWhom}>Clear a user</button>
      </div>
      <${Loaded} read=${throttle}>
        ${({ throttled: listed }) =>
          html`<${Table}
            label="Throttled logins"
            columns=${columns(listed)}
            rows=${listed}
            keyOf=${(held) => `${held.kind} ${held.user} ${held.address}`}
            empty="Nobody has to wait."
          />`}
      <//>
    </section>
  `;
}

function whoOf({ kind, user }) {
  return kind === "user" ? user : kind === "network" ? "everyone unknown there" : "unknown names";
}

function whoFrom(held) {
  return held.kind === "network" ? `everyone unknown in ${held.address}` : `${whoOf(held)} from ${held.address}`;
}

/** Return from which other addresses a user has to wait. */
function elsewhere(listed, { kind, user, address }) {
  const same = listed.filter((held) => kind === "user" && held.kind === kind && held.user === user && held.address !== address);
  return same.map((held) => held.address).join(", ");
}
