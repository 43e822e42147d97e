"""Keeps tokens, pools and failed logins in a database."""
