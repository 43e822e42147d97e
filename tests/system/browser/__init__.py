"""Web pages that call the service, in a real Chromium."""
