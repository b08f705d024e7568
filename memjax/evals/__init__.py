"""Evaluation: perplexity (`perplexity`), generation (`generation`), and on a run (`run`)."""
