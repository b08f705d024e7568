"""memjax: train, stress and compare memory architectures for language modelling."""

__version__ = "0.1.0"
