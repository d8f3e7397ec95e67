"""The names that flags choose from, without torch: a parser needs no more, and answers at once.

What a name stands for is in the registry beside its functions; tests/test_choices.py compares the
two.
"""

#: `--outlayer-state`: names in HEAD_INITS (models/build.py).
HEAD_INITS = ("normal", "kaiming_uniform", "keep")
#: `--replace-bn`: names in BATCHNORM_REPLACEMENTS (models/batchnorm.py).
BATCHNORM_REPLACEMENTS = ("groupnorm",)
#: `--ra-mode`: how models/rank_analysis.py counts |w|.
RANK_MODES = ("all", "original")
#: `--dp-mode` and the mode of a `Protection` (models/target.py): whose gradient is clipped.
PROTECTION_MODES = ("batch", "per-sample")
#: `--sweep`: what train/variation.py can change in a client, each a flag of training.py.
SWEEP_PARAMETERS = (
    "sigma",
    "C",
    "batch-size",
    "local-steps",
    "defence",
    "label-smoothing",
    "replace-bn",
)
