"""The error of this package."""

from memjax.config import ConfigError


class DataError(ConfigError):
    """Text, a tokenizer or a cache cannot be used; the message is one line for the user."""
