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
#: `--dp-mode`: whose gradient is clipped before noise is added.
DP_MODES = ("batch", "per-sample")
#: What `--defence` puts between the client's gradient and the server, with what it does.
DEFENCE_NAMES = {
    "none": "Sends the gradient as it is.",
    "dp-sgd": "Clips every image's gradient to norm C, averages, adds noise of MULTIPLIER · C / B.",
    "batch": "Clips the batch's mean gradient to norm C and adds noise of deviation SIGMA.",
    "topk": "Sends the share SHARE of all entries that is largest in magnitude.",
    "random": "Sends the share SHARE of all entries, drawn at random, as they are.",
    "percentile": "Sends what exceeds the P-th percentile of all magnitudes, cut to ±GAMMA.",
    "svt": "Sends entries that the sparse vector technique selects, with noise, cut to ±GAMMA.",
    "int8": "Sends every tensor rounded to 255 evenly spaced values up to its largest magnitude.",
    "sign": "Sends the sign of every entry, times the mean magnitude of its tensor.",
    "groupnorm": "Puts GroupNorm in the place of every BatchNorm layer.",
    "local-steps": "Sends the update of T local steps.",
    "larger-batch": "Takes B images per batch.",
}
#: Modes of a `Protection` (models/target.py) in which entries were left out and are 0.
SPARSE_MODES = ("topk", "random", "percentile", "svt")
#: The mode of a `Protection`: what was done to the gradient; that of dp-sgd is "per-sample".
PROTECTION_MODES = (*DP_MODES, *SPARSE_MODES, "int8", "sign")
#: `--loss` and `ClientLoss.kind`: names in LOSSES (models/losses.py).
LOSS_KINDS = ("cross-entropy", "bce")
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
