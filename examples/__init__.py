"""Short programs that use tokenauth. Each docstring says how to run the program."""
