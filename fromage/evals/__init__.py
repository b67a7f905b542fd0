"""Evaluations: each is evaluate(model, data) -> a report, see fromage.evals.report; the command line prints it."""
