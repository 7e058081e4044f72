"""Values and arithmetic: torch only; no files, no network, no transformers, and no name of a device."""
