"""transformers' TrainingArguments in this library's stages: what is honoured, refused, or has no effect."""
