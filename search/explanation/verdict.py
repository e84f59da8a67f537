"""What the tests of a method's maps come to, in a line."""

from collections.abc import Iterator, Mapping
from typing import Any

from scipy.stats import binomtest  # type: ignore[import-untyped]

# Of the sign test: a map that is no better than a random one passes once in twenty times.
ALPHA = 0.05

# Rank correlation of maps before and after all weights are forgotten; no source gives a bound.
MAX_CORRELATION = 0.5


def judge(explanation: Mapping[str, Any], method: str) -> str:
    """Return which tests a method's maps pass, and whether to read them.

    A map passes deletion or insertion if it does better than a random one on more images than
    chance would have it (one-sided sign test); forgotten weights if the map follows them; and the
    pointing game if the interval of its share lies above that of a random point.

    Args:
        explanation: As of `explain_images`.
        method: One of its methods.
    """
    found = dict(_outcomes(explanation, method))
    if not found:
        return "not judged: five images or more are needed"
    if failed := [test for test, is_passed in found.items() if not is_passed]:
        return f"fails {', '.join(failed)}: do not go by its maps"
    return f"passes {', '.join(found)}"


def _outcomes(explanation: Mapping[str, Any], method: str) -> Iterator[tuple[str, bool]]:
    tests = explanation.get("tests")
    # Of fewer images not even all could pass.
    if tests is not None and 0.5 ** tests["num_images"] < ALPHA:
        num_images = tests["num_images"]
        for kind in ("deletion", "insertion"):
            num_better = round(tests[method][kind]["share_better_than_random"] * num_images)
            chance = binomtest(num_better, num_images, 0.5, alternative="greater").pvalue
            yield kind, chance < ALPHA
        correlation = tests[method]["weights_forgotten_down_to"]["stage 1"]["spearman"]
        yield "forgotten weights", correlation is None or abs(correlation) < MAX_CORRELATION
    if game := explanation.get("pointing_game"):
        yield "pointing game", game[method]["share"]["low"] > game[method]["random_point"]
