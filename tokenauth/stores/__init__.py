"""Stores answer: what they are asked, and nothing about what it means."""
