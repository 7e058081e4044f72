"""Values and arithmetic: torch only; no files, no network, no transformers, no device named anywhere."""
