"""What stores can be asked to change: each change is written once for all databases."""
