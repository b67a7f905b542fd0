"""Training: the step, its losses, and everything a run needs.

Where to look:

    reference_step      the training step as the released code computes it: captioning, [RET], InfoNCE
    fast_step           the same losses and gradients with less work: the one-token backward
    losses              next-token cross-entropy and InfoNCE
    module              the Lightning module: optimiser, pairing, validation (fromage.data.batches truncates captions)
    checkpoint_io       checkpoints; exact resume is in fromage.data.loader
    memory_planner      memory and work of a run, before it starts; meter counts them; Octopus' shares planning with it
    strategy            several devices: the frozen language model spread over them, or all that is trained
"""
