"""The model: two frozen towers and the trained parameters between them.

Shapes, everywhere: B batch, T tokens, k embeddings per image, m width of image features, d width of the language model,
q width of the retrieval space, V tokens of the frozen vocabulary."""
