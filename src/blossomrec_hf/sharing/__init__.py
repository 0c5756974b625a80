"""Cards, uploads, exports and conversions of checkpoints."""

from .upload import push


__all__ = ["push"]
