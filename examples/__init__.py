"""Short programs that show what tokenauth is for; each says how to run it."""
