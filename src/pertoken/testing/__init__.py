"""Laws anyone can call, and the tiny models to call them on."""

from pertoken.testing.mock import ByteTokenizer, MockModel
from pertoken.testing.models import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

__all__ = ["ARCHITECTURES", "EXTRA_ARCHITECTURES", "ByteTokenizer", "MockModel", "tiny_model"]
