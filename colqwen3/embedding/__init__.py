"""Queries and pages to one vector per token, in batches, and the file that holds them."""
