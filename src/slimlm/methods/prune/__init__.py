"""One file per method. A file imports torch and slimlm.core, and no other method."""
