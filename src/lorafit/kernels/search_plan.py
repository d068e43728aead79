"""Where the search for a block's scale and offset looks, by vector code and by torch alike."""

# Where it begins: how much of the range is left out at either end.
TRIMS = (0.0, 0.05, 0.1)
# Where it goes on from the best result: factors on the step, and shifts of the offset in steps.
MOVES = tuple((factor, shift) for factor in (0.985, 1.015) for shift in (-0.3, -0.1, 0.1, 0.3))
ROUNDS = 2
