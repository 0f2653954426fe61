"""Text from a language model: prompts, decoding, sampling."""
