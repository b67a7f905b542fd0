"""Applications that people look at: the terminal, the notebook, the web demo, and the tours of the toy world."""
