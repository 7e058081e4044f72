"""Faster decoding of Llama-like models: their structure recognized, one call of the kernels per step."""
