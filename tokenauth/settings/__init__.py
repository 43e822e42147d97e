"""The configuration: its records, how they are read, and how users are edited."""
