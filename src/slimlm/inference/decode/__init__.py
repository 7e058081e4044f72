"""Fast decoding of models that are built like Llama."""
