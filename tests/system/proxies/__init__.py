"""The five proxies of docs/forward-auth.md, with the configuration files that it shows."""
