"""RemoteTokens and TokenAuth."""
