"""Generation: text and retrieved images out of prompts."""
