"""How the loss by quantization changes with the size of the model.

``python -m demo.studies.scale --shape 39m --out DIR`` does one size, from training to figures: it
trains a study model, quantizes it by a dozen recipes and measures each on two page sets.
``python -m demo.studies.scale.summary DIR/*.json`` makes a table and a plot of what is there.

The models are small ones of the same architecture that are trained for this; what holds for them
need not hold for the published model of 4.4 billion parameters.
"""
