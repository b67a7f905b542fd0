"""The models: frozen towers and the trained parameters between them.

Where to look:

    fromage             FROMAGe's trained parameters: visual prefix W_c, text head W_t, image head W_i
    base                the visual prefix as FROMAGe and Octopus share it
    special_tokens      the [RET] rows: trained rows beside a frozen vocabulary
    fusion              one embedding from the states at several [RET] tokens
    language_model      the frozen language model; packed_attention, packed_layout: without padding
    vision              the frozen vision towers
    prompts             interleaved text and images -> input embeddings

The legend of shapes, for all packages:

    B   examples in a batch
    T   tokens of a sequence, padding included
    N   tokens, images or rows in a list without padding
    k   input embeddings per image
    m   width of the image features
    d   width of the language model
    q   width of the retrieval space
    V   tokens of the frozen vocabulary
    n   trained rows beside it, r for [RET]; also distinct images of a batch of prompts
    r   [RET] tokens at the end of a caption or query; the paper has 1
    f   trained rows that are never chosen, but follow another: r - 1
    c   positions whose logits are computed at a time
    C   continuations that are scored
    D   devices
    b, t, s: part of a batch, tokens of an answer so far, images seen so far
    H, W in (3, H, W): height and width of an image in pixels

    packed attention: S sequences, H attention heads (H' of keys and values), e width of a head, T' keys per query
    CLIP: e width of the space that images and texts share
    Octopus: N object queries, P patches per image, A tokens of an answer, L layers and c width of the DETR decoder,
        K objects per image at most, E prompts with queries, S tokens of a row so far; in lists without padding M objects, or
        M tokens of prompts and F after them, Y of which are predicted
"""
