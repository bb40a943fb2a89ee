"""A small BAGEL that draws a synthetic world: its data, its training and its evaluation."""
