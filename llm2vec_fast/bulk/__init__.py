"""Corpora in, folders of embeddings out, and search over such folders."""
