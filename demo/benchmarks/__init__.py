"""Time and memory at the true size of the 4B model, with random weights."""
