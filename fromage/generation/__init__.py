"""Generation: prompts of text and images -> text and retrieved images.

Where to look:

    generate            answers of text and images; captions
    options             the options of an answer: Decoding, their limits and descriptions
    decoding            the decoding loop with its key-value cache, the [RET] bias, sampling
    retrieved           the images of a generated [RET] (re-ranking of candidates is in fromage.retrieval.rerank)
    score               log-likelihoods of continuations
    styles              how turns stand in a prompt: texts around them, or the tokenizer's chat template
    chat                conversations and their history
    preset              how to talk with a model, stored beside its weights; ret_tuning sets its [RET] bias by example
    tuple_writer        conditions and target captions for composition learning, written by a language model
"""
