"""Scaled dot product attention whose result for a sequence has the same bits alone and in any batch."""
