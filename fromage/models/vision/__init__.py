"""Vision towers: the contract (base), one file for each library (open_clip, timm), and their names (registry)."""
