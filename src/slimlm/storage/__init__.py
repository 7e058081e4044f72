"""The packed checkpoint: the only place that touches its files."""
