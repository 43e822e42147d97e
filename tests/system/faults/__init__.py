"""Long fault runs (`make faults`); their short forms are in `tests/promises`."""
