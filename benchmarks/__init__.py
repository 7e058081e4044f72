"""Scripts; tests import the tiny models from here, too."""
