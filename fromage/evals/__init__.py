"""Evaluations: each is evaluate(model, data) -> figures; the command line prints them."""
