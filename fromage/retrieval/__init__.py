"""Retrieval: embeddings, image indexes and their search."""
