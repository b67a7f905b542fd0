"""Octopus: objects recognised in parallel in the lower layers of a language model, and pointed at from the upper ones.

A reconstruction of Zhao et al., "Octopus: A Multi-modal LLM with Parallel Recognition and Sequential Understanding",
NeurIPS 2024, of which no code was published: the abstract, figures and settings are theirs, the rest is ours.
"""
