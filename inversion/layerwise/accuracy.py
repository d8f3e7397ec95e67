"""Says how exact a gradient is, and which residuals follow from that."""

from dataclasses import dataclass

#: A solved layer may leave this many times the rounding error of the gradient's type: what the
#: client's own arithmetic adds up to, measured up to 80 times on ResNets in float32.
ARITHMETIC = 400.0
#: Fraction of that above which masks are checked: a wrong entry leaves more.
SUSPICIOUS = 0.1
#: Share of the added noise that a right solution may leave, and from which masks are looked at.
MOST_NOISE, SUSPICIOUS_NOISE = 10.0, 1.5
#: No layer is certified that leaves more than this share of its gradient, whatever the noise.
LARGEST = 0.1
#: Nor one whose relative error is expected to be larger than this.
MOST_ERROR = 1e-2
#: What raises the rank of the head's gradient counts as noise above this many rounding errors.
CLEAR_NOISE = 4.0
#: The least that float64 equations leave in practice.
LEAST = 1e-11
#: Least singular value that is used, in shares of the largest, and in units of the error.
CUT, CUT_OF_ERROR = 1e-4, 1.0


@dataclass(frozen=True)
class Accuracy:
    """Holds the errors of one parameter's gradient, relative to its norm."""

    #: Rounding error of the type that the client computed in.
    rounding: float
    #: Of noise and of rounding to a narrower type on top of that.
    noise: float = 0.0

    @property
    def error(self) -> float:
        """Return the error as one number, in shares of the gradient's norm."""
        return (self.rounding**2 + self.noise**2) ** 0.5

    @property
    def certified(self) -> float:
        """Return the largest relative residual of a layer that counts as solved."""
        allowed = max(LEAST, ARITHMETIC * self.rounding) + MOST_NOISE * self.noise
        return min(LARGEST, allowed)

    @property
    def suspicious(self) -> float:
        """Return the relative residual from which a layer's masks are looked at."""
        allowed = SUSPICIOUS * max(LEAST, ARITHMETIC * self.rounding)
        return min(LARGEST, allowed + SUSPICIOUS_NOISE * self.noise)

    @property
    def cut(self) -> float:
        """Return the share of the largest singular value from which a direction is used."""
        return max(CUT, CUT_OF_ERROR * max(self.rounding, self.noise))
