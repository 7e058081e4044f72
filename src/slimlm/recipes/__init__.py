"""The recipes that come with slimlm, one TOML file each."""
