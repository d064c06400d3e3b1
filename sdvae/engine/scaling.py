"""Range scaling: a network that carries its residual stream at 2^-k, so that fp16 can hold it. Integers, no torch.

GroupNorm forgets the scale of its input, so what enters the stream may be scaled, with its biases, if the eps of each
norm that reads it is scaled with the square. k changes where a convolution lies on the skip path (conv_in, shortcuts,
up- and downsamplers), and every resnet's h has a k of its own. Powers of two change no bit of an fp32 or bf16 result.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sdvae.engine.stages import Network

LARGEST = 2.0**14  # a quarter of fp16's range: images will exceed what the calibration saw

Exponents = Mapping[str, int]  # k of what a stage or a shortcut writes; 0 where it is not named


@dataclass(frozen=True, slots=True)
class Scale:
    """What a stage's weights are multiplied by."""

    weight: float = 1.0
    bias: float = 1.0
    eps: float = 1.0
    shortcut_weight: float = 1.0
    shortcut_bias: float = 1.0


def plan_scales(network: Network, exponents: Exponents) -> Iterator[Scale]:
    """The factors of each stage, in order."""
    x = h = 0  # the exponents of what the stream and h hold now
    for stage in network.stages:
        source = h if stage.source == "h" else x
        eps = 4.0**-source
        if stage.target == "output":
            yield Scale(eps=eps)
        elif stage.adds:
            yield Scale(2.0**-x, 2.0**-x, eps)
        elif stage.target == "h":
            h = exponents.get(stage.name, 0)
            before, x = x, exponents.get(stage.shortcut, 0) if stage.shortcut else x
            yield Scale(2.0**-h, 2.0**-h, eps, 2.0 ** (before - x), 2.0**-x)
        else:  # conv_in, or a convolution between levels
            before, x = x, exponents.get(stage.name, 0)
            yield Scale(2.0 ** (before - x), 2.0**-x)


def choose_exponents(network: Network, peaks: Mapping[str, float]) -> dict[str, int]:
    """The smallest exponents that bring the peaks of an unscaled run below LARGEST.

    `peaks` are the largest absolute values that each stage (and shortcut) left in what it writes to.
    """
    exponents: dict[str, int] = {}
    entry = ""  # what set the exponent of x last
    for stage in network.stages:
        if stage.target == "h":
            exponents[stage.name] = _exponent(peaks[stage.name])
            if stage.shortcut:
                entry = stage.shortcut
                exponents[entry] = _exponent(peaks[entry])
        elif stage.target == "x":
            if not stage.adds:
                entry = stage.name
            exponents[entry] = max(exponents.get(entry, 0), _exponent(peaks[stage.name]))
    return {name: exponent for name, exponent in exponents.items() if exponent}


def _exponent(peak: float) -> int:
    exponent = 0
    while peak > LARGEST * 2.0**exponent:
        exponent += 1
    return exponent
