"""Operations with a backward pass written by hand: the same numbers as the plain ones, sooner."""
