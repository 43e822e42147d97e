/** Types of tokenauth.js. docs/javascript.md explains how to use it. */

export interface TokenAuthOptions {
  /** The tokenauth server. Default: where the module was loaded from. */
  url?: string | URL;
  /** Other origins that get the token, such as "https://api.example.com". The server's own origin always does. */
  origins?: readonly string[];
  /** "memory" (default): a reload logs out. "session": the login is in sessionStorage and survives a reload. */
  storage?: "memory" | "session";
  /** Which header carries the token. Default: "X-Token". "Authorization" sends `Bearer` and the token. */
  header?: "X-Token" | "Authorization";
}

/**
 * "logout": logout() was called. "expired": its time was over. "revoked": the server no longer knows the token.
 * "other_tab": the same user logged out in another tab.
 */
export type LogoutReason = "logout" | "expired" | "revoked" | "other_tab";

export interface TokenAuthEvents {
  login: Event;
  logout: CustomEvent<{ reason: LogoutReason }>;
}

export type TokenAuthErrorCode =
  | "invalid_credentials" // wrong user name or password
  | "too_many_attempts" // see retryAfter
  | "unavailable" // the server is overloaded or has no database; see retryAfter
  | "unreachable" // no connection, no answer in time, or the page's origin is not in cors_origins
  | "unexpected_answer" // an answer that makes no sense here; see status and message
  | "login_pending" // login() was called while another login was under way
  | "logged_out" // fetch() without a login, or login() that a logout() came before
  | "origin_not_listed" // fetch() to an origin that may not have the token
  | "redirected" // fetch() got a redirect, which it does not follow
  | "invalid_request" // fetch() with mode "no-cors", which cannot carry a token
  | "invalid_option"; // a mistake in TokenAuthOptions

export class TokenAuthError extends Error {
  constructor(
    code: TokenAuthErrorCode,
    message: string,
    details?: { status?: number; retryAfter?: number; cause?: unknown },
  );
  /** For programs. The message is for people. */
  readonly code: TokenAuthErrorCode;
  /** The HTTP status of the server's answer, if there was one. */
  readonly status: number | undefined;
  /** When to try again, in seconds, if the server said so. */
  readonly retryAfter: number | undefined;
}

/** A login to a tokenauth server. */
export class TokenAuth extends EventTarget {
  /** Throws a TokenAuthError with the code "invalid_option". */
  constructor(options?: TokenAuthOptions);
  /** Whether there is a login that has not ended. */
  get loggedIn(): boolean;
  /** The name that logged in, or null. */
  get username(): string | null;
  /** When the login ends, as far as is known, or null. A sliding lifetime moves it. */
  get expiresAt(): Date | null;
  /**
   * Log in. An earlier login is replaced, and its token revoked. A second call with the same name and password, as of
   * a double click, joins the first. Rejects with a TokenAuthError, or with the reason of the signal. If the token
   * arrives after that, it is revoked.
   */
  login(username: string, password: string, options?: { signal?: AbortSignal }): Promise<void>;
  /**
   * Log out here and in the user's other tabs, at once, then revoke the token at the server. A login() that has not
   * finished is rejected with "logged_out". Rejects with a
   * TokenAuthError if the server could not do that: the token is still valid, and another logout() tries again.
   */
  logout(): Promise<void>;
  /**
   * Like the global fetch(), with the token, for listed origins only. Follows no redirects and repeats no request.
   * Rejects with a TokenAuthError if it did not send the request or was redirected; otherwise as fetch() does.
   * It is bound: `const { fetch } = auth` works.
   */
  fetch(input: RequestInfo | URL, init?: RequestInit): Promise<Response>;
  /** Stop timers and listeners, without logging out. */
  close(): void;
  addEventListener<K extends keyof TokenAuthEvents>(
    type: K,
    listener: (event: TokenAuthEvents[K]) => unknown,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof TokenAuthEvents>(
    type: K,
    listener: (event: TokenAuthEvents[K]) => unknown,
    options?: boolean | EventListenerOptions,
  ): void;
}
