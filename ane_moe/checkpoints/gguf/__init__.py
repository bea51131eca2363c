"""GGUF files, llama.cpp's form of a model, read as the checkpoint that they were made from: weights
by transformers' names, config.json and tokenizer out of the metadata."""
