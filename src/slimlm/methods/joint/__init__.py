"""One file per method. The files know torch and slimlm.core, and not one another."""
