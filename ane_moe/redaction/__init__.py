"""From text to redacted text, by a token classifier's scores: windows, decoding, spans,
placeholders."""
