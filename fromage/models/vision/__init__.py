"""Vision towers: the contract (base), one file per library (open_clip, timm), and the registry of names (registry)."""
