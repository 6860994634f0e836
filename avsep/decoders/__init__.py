"""Mask decoders. Importing this package registers the built-in ones."""

from avsep.decoders.query_transformer import QueryTransformer

__all__ = ["QueryTransformer"]
