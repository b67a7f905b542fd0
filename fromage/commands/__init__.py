"""The verbs of the command line: each module has some functions and the table that names their options."""
