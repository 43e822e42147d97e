"""The five proxies of docs/forward-auth.md, run from the very files that it shows."""
