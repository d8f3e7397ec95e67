"""Golden values of every distance, prior, label method and metric.

    python -m tests.golden        writes tests/golden.json anew; review the difference

The inputs are sines of an index, so that they are the same on every machine and version.
"""

import json
from pathlib import Path

import torch

from inversion.distances import GRADIENT_DISTANCES
from inversion.labels.evidence import Auxiliary, Evidence
from inversion.labels.reconstruct import LABEL_FUNCTIONS
from inversion.priors import PRIOR_FUNCTIONS, Candidate
from utils import metrics

FILE = Path(__file__).with_name("golden.json")


def wave(*shape, speed):
    """sin(speed · index), shaped; in [−1, 1]."""
    count = torch.Size(shape).numel()
    return torch.sin(speed * torch.arange(count, dtype=torch.float64)).view(shape)


def label_evidence():
    """A head of four classes that saw twelve samples, its gradient and an auxiliary set."""
    weight, bias = 3 * wave(4, 5, speed=1.7), 0.1 * wave(4, speed=0.9)
    y = torch.tensor([0, 2, 2, 1, 2, 0, 2, 2, 0, 2, 2, 2])
    h = 1 + wave(12, 5, speed=2.3)
    residual = (h @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(y, 4)
    features, labels = 1 + wave(24, 5, speed=2.9), torch.arange(24) % 4
    return Evidence(
        weight_grad=residual.T @ h / 12,
        bias_grad=residual.mean(0),
        weight=weight,
        bias=bias,
        batch_size=12,
        public=features,
        auxiliary=Auxiliary(features, labels, features, h.mean(0)),
    )


def values():
    """Name → value of everything that has a golden one."""
    gradient = [wave(4, 3, speed=0.7), wave(5, speed=1.3)]
    target = [wave(4, 3, speed=0.6), wave(5, speed=1.1)]
    x = wave(2, 3, 16, 16, speed=0.9)
    candidate = Candidate(
        x,
        [(wave(4, speed=0.3), 1 + wave(4, speed=0.2)), (wave(6, speed=0.8), wave(6, speed=0.5))],
        [(wave(4, speed=0.4), 1 + wave(4, speed=0.1)), (wave(6, speed=0.7), wave(6, speed=0.6))],
        consensus=wave(2, 3, 16, 16, speed=0.85),
    )
    image = (1 + wave(2, 3, 16, 16, speed=0.05)) / 2
    true = (1 + wave(2, 3, 16, 16, speed=0.06)) / 2
    result = {
        f"distance {k}": d.value(gradient, target).item() for k, d in GRADIENT_DISTANCES.items()
    }
    result |= {f"prior {k}": prior(candidate).item() for k, prior in PRIOR_FUNCTIONS.items()}
    result |= {
        f"labels {k}": method(label_evidence()).counts.tolist()
        for k, method in LABEL_FUNCTIONS.items()
    }
    result |= {f"metric {k}": f(image, true).tolist() for k, f in metrics.METRICS.items()}
    return result


if __name__ == "__main__":
    FILE.write_text(json.dumps(values(), indent=1) + "\n")
    print(f"written: {FILE}")
