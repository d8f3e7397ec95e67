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
#: `--loss` and `ClientLoss.kind`: names in LOSSES (models/losses.py).
LOSS_KINDS = ("cross-entropy", "bce")
