"""Serving: the item index."""
