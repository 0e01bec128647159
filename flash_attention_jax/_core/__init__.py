"""The meaning of a call: its record, and one definition of everything that an engine computes.

Checks of arguments, the platform, tiles, masks, logits, similarity, dropout. Nothing here knows an
engine, a kernel or a public function.
"""
