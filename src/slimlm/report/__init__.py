"""Tables, a live display and a plot: plain data in, text out. With `cli` the only room that uses rich."""
