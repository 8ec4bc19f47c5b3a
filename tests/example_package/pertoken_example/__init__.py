"""Two ways of decoding, brought to pertoken by entry points."""
