"""What every store must do: each sentence of `tokenauth/stores/store.py` as tests that run on each store."""
