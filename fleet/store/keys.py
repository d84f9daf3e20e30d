"""What a key or a file name may look like, in every store."""

from __future__ import annotations


def check_key(key: str) -> str:
    """`key` itself. Raises ValueError if it could leave the store or mean two things."""
    if not all(part and part not in (".", "..") for part in key.split("/")) or "\0" in key:
        raise ValueError(f"not a key: {key!r} (no leading slash, empty part, `.` or `..`)")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself: empty, a key, or a key and one slash. Raises ValueError otherwise."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def is_visible(name: str) -> bool:
    """Whether a listing shows `name`: it is a key, and no part of it is hidden."""
    return all(part and not part.startswith(".") for part in name.split("/"))
