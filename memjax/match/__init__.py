"""Match architectures before they are trained: solve for sizes until two configs cost the same.

What is compared is what `memjax describe` counts, by the same functions: parameters, bytes of
state a sequence, or training FLOPs a token.
"""

from memjax.match.command import run_match
from memjax.match.search import Matched, match
from memjax.match.settings import By, Match, quantity

__all__ = ["By", "Match", "Matched", "match", "quantity", "run_match"]
