"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """ "512 B", "1.5 KiB", "256.6 MiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"
