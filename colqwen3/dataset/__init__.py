"""Document sets in the BEIR convention: pages, queries and relevance judgements."""
