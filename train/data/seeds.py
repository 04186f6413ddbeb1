"""Seeds that follow from what they are for: a question and an arm, whatever was drawn before."""

import hashlib


def mix(*numbers) -> int:
    """A seed of 63 bits that depends on every number (or name) given, and on their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
