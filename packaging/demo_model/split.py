"""The split: an example's canonical key alone decides whether it is trained on or held out."""

import hashlib

HELD_OUT_PERCENT = 10


def is_held_out(key: str | None) -> bool:
    if key is None:
        return False
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT
