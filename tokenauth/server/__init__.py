"""Processes and sockets: everything that uses the internals of uvicorn.

Everything starts and works on macOS too; tests simulate that, but do not run there. These work on Linux only:

- Hashing threads run at low priority (`executor`).
- No connection is reset when the server stops (`server.listener.stop_handshakes`). Elsewhere a client that connects in
  the last instant can be.
- Password hashes are refused when they need more memory than the control group has (`passwords.machine_memory_kib`),
  and `passwords.threads = 0` means the cores that the process may use, not all cores of the machine.
- Monotonic clocks count the time that the machine is suspended (`clock`: CLOCK_BOOTTIME).
- Editing config.toml keeps access control lists and labels, and checks that there is room before it overwrites a file
  (`settings.text_file`).
- `serve` raises its limit of file descriptors to the hard limit. On macOS it raises it to 10,240 if that is refused.
"""
