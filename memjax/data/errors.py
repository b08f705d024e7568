"""The error of this package."""


class DataError(ValueError):
    """Text, a tokenizer or a cache cannot be used; the message is one line for the user."""
