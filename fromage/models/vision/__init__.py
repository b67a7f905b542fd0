"""Vision towers: the contract (base), one file per library (open_clip, timm, huggingface), and their names (registry)."""
