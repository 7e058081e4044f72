"""The shipped recipes: TOML files that `slimlm.recipe` reads."""

DEFAULT_RECIPE = "best"
