"""Conditional positional encodings for vision transformers: the models, their training, the measurements."""
