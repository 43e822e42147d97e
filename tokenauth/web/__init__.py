"""HTTP: how requests are read, routed, guarded and answered."""
