"""Mixture-of-Experts language models on the Apple Neural Engine: convert, prove, place, measure."""
