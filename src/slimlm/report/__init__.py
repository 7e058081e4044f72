"""Tables, a live display and a plot: plain data in, text out. Only `report` and `cli` use rich."""
