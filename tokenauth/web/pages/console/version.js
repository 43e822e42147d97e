// Whether the service still has the version of this page.

import { useEffect, useState } from "./preact.js";

const VERSION = new URL(".", import.meta.url).pathname.split("/").at(-2);

let old = false;
const listeners = new Set();

/** Ask the service. While it does not answer, nothing changes. */
export async function checkVersion() {
  try {
    const page = await (await fetch("console", { cache: "no-store" })).text();
    if (page.includes("console/")) old = !page.includes(`console/${VERSION}/`);
  } catch {
    return;
  }
  listeners.forEach((listener) => listener(old));
}

/** Return whether the service is known to have another version of this page. */
export function useOutdated() {
  const [outdated, setOutdated] = useState(old);
  useEffect(() => {
    listeners.add(setOutdated);
    setOutdated(old);
    return () => listeners.delete(setOutdated);
  }, []);
  return outdated;
}
