"""What a compression is worth: tasks in, rows of figures out, with the configuration that made them."""
