"""Generation: prompts of text and images -> text and retrieved images.

Where to look:

    generate            answers of text and images; captions
    decoding            the options, the [RET] bias, sampling, and the decoding loop with its key-value cache
    retrieved           the images of a generated [RET] (re-ranking of candidates is in fromage.retrieval.rerank)
    score               log-likelihoods of continuations
    styles              how turns stand in a prompt: texts around them, or the tokenizer's chat template
    chat                conversations and their history
"""
