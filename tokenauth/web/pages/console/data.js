// Reads documents of the API for a view, and again after an event about them.

import { call, now } from "./api.js";
import { subscribe } from "./live.js";
import { useEffect, useRef, useState } from "./preact.js";

const PAUSE = 300; // milliseconds, where much is going on

/**
 * Read an address of the API, or what a function returns, and then that of a new one. Return `data` (undefined until it
 * has come), when it was read (`at`), `error` of the latest attempt, and `reload`, which returns after a reading that
 * began later than the call.
 */
export function useData(address, ...topics) {
  const [state, setState] = useState({});
  const reload = useRef(() => {});
  useEffect(() => {
    let current = true;
    let reading = null;
    let next = null;
    const readOnce = async () => {
      try {
        const data = typeof address === "function" ? await address() : await call("GET", address);
        if (current) setState({ data, at: now() });
      } catch (error) {
        if (current) setState((before) => ({ ...before, error }));
      }
    };
    const readNext = async () => {
      await reading;
      await new Promise((done) => setTimeout(done, PAUSE));
      next = null;
      if (current) await read();
    };
    const read = () => {
      if (address === null || next) return next;
      // What has changed meanwhile may be missing in the answer that is on its way.
      if (reading) return (next = readNext());
      return (reading = readOnce().finally(() => (reading = null)));
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
