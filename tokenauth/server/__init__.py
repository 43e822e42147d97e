"""Processes and sockets: everything that touches uvicorn's inside."""
