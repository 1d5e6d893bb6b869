"""Vectors of whole document collections: what to embed, in which format, into Parquet shards."""
