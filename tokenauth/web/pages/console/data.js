// Reads documents of the API for a view, and again after an event about them.

import { call, now } from "./api.js";
import { subscribe } from "./live.js";
import { useEffect, useRef, useState } from "./preact.js";

const PAUSE = 300; // milliseconds, where much is going on

/** Read an address of the API, or what a function returns, and then that of a new one. Return `data` (undefined until it has come), when it was read (`at`), `error` of the latest attempt, and `reload`. */
export function useData(address, ...topics) {
  const [state, setState] = useState({});
  const reload = useRef(() => {});
  useEffect(() => {
    let current = true;
    let reading = false;
    let again = false;
    const read = async () => {
      again = reading; // what has changed meanwhile may be missing in the answer that is on its way
      if (reading || address === null) return;
      reading = true;
      try {
        const data = typeof address === "function" ? await address() : await call("GET", address);
        if (current) setState({ data, at: now() });
      } catch (error) {
        if (current) setState((before) => ({ ...before, error }));
      }
      if (again) await new Promise((done) => setTimeout(done, PAUSE));
      reading = false;
      if (again && current) await read();
    };
    reload.current = read;
    read();
    const unsubscribe = subscribe(topics, read);
    return () => {
      current = false;
      unsubscribe();
    };
  }, [address]);
  return { ...state, reload: () => reload.current() };
}
