"""The contract of `tokenauth/stores/store.py` as tests that run on each store."""
