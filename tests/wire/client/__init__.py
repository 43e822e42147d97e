"""The clients: what a downstream service imports."""
