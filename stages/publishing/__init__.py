"""The released folder: card, weight formats, the model code that travels."""
