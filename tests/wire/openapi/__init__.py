"""The OpenAPI document is compared with the routes and with real responses."""
