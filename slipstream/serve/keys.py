"""Keys: who may come in."""

import hmac
from collections.abc import Mapping, Sequence

UNKNOWN = "The API key is missing or not known; send Authorization: Bearer KEY, or x-api-key: KEY."


class Keys:
    def __init__(self, keys: Sequence[str]) -> None:
        """keys: any of them opens; none: everybody may."""
        self._keys = [key.encode() for key in keys]

    def open(self, headers: Mapping[bytes, bytes]) -> bool:
        """headers: of a request, their names in lower case."""
        if not self._keys:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")  # Anthropic's
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all of them, at equal cost
        return any(found)
