"""Checkpoints: trained parameters as files, without the towers."""
