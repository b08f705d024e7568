"""Axis letters: every array's name ends in its axes, in order (`k_BTHK`, `scores_BHTJ`).

Public functions also carry jaxtyping annotations with the same letters, checked under pytest only.
"""

AXES = {
    "B": "batch (one lane of it is one stream of text)",
    "T": "tokens in the segment",
    "J": "key positions (cache, then segment)",
    "N": "chunks",
    "C": "tokens in a chunk",
    "D": "model width",
    "H": "heads",
    "G": "key and value heads shared by groups of query heads",
    "K": "key size of a head",
    "V": "value size of a head",
    "F": "width of the MLP",
    "M": "memory slots, or cached tokens",
    "R": "repeats of the layer pattern",
    "Y": "vocabulary",
}
