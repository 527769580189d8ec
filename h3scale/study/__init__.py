"""Several h3scale commands in a row: the demo, and the comparison of methods."""
