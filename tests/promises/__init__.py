"""What DESIGN.md promises in section 5: one module for each promise, against real processes."""
