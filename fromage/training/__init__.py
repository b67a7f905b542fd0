"""Training: the step, its losses, and everything a run needs.

Where to look:

    step                what all training steps share: weights of the losses, their output
    reference_step      the training step as the released code computes it: captioning, [RET], InfoNCE
    fast_step           the same losses and gradients with less work: the one-token backward
    reference_composition, fast_composition     the losses of composition learning, both ways
    losses              next-token cross-entropy and InfoNCE
    module              the Lightning module: optimiser, pairing, validation; guarded_module is shared with Octopus'
    hyperparameters     checks of the module's options
    schedule            the learning rate; a resumed run has its own
    validation          recalls and contact sheets of a validation; gather puts together what several devices have
    nonfinite           losses and gradients that are not finite
    fit, lightning_cli  `lightning fit` and its kin; configs finds configurations, config_options reads
                        a run's options from them, option_errors tells what is wrong in one; progress_bar
    runs                folders of runs; run_report and predictions are what a run leaves in one
    checkpoint_io       checkpoints that survive a kill; exact resume is in fromage.data.loader
    lr_finder           a learning rate
    memory_planner      memory and work of a run, before it starts; meter counts them
    plan, plan_report   what it found, also of Octopus, and as text; published_sizes: language models' configurations
    layers              the frozen layers: compiled, recomputed, sharded
    strategy            several devices: the frozen language model spread over them, or all that is trained
"""
