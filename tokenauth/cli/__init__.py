"""The operator's words."""
