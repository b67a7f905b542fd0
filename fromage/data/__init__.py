"""Data: shards of images and captions to batches of tensors."""
