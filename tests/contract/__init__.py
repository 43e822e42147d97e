"""What every store must do: each sentence of `tokenauth/stores/base.py` as tests that run on each store."""
