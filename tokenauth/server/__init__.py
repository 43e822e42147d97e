"""Processes and sockets: everything that uses the internals of uvicorn.

`docs/production.md` lists what works on Linux only.
"""
